"""Operations on whole servers and clusters, without a terminal."""
