"""Checks across options: combinations that are refused, and options without effect beside others.

Checks of a single option, its type and its range, are in ``validation``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import combinations
from typing import TypeVar

from msgspec.structs import replace

from .._limits import NEAR_SHARED_BYTES
from ..errors import shorten
from . import ioredis
from .model import NearCacheOptions, Options
from .validation import Location

_logger = logging.getLogger("dscache")

OptionsT = TypeVar("OptionsT", bound=Options)


def complete(options: OptionsT, place: Location, folder: str) -> OptionsT:
    """Return the options with absolute paths of TLS files; relative ones start at ``folder``.

    Raises ConfigError if the options exclude each other, or a TLS file can't be used.
    """
    if options.tls:
        options = replace(options, tls=options.tls.located(folder, place.at("tls")))
    shared = options.redis_options
    if shared.tls:
        tls = shared.tls.located(folder, place.at("redisOptions").at("tls"))
        options = replace(options, redis_options=replace(shared, tls=tls))
    check_sentinels(options, place)
    if options.near_cache:
        check_near_cache(options, options.near_cache, place.at("nearCache"))
    return options


def check_sentinels(options: Options, place: Location) -> None:
    """Raise ConfigError if ``sentinels``, ``name`` and ``nodes`` don't go together."""
    if options.sentinels and not options.name:
        raise place.at("name").error("is missing; write the name of the group the Sentinels watch")
    if options.sentinels and options.nodes:
        raise place.at("nodes").error("a cluster has no Sentinels; leave out sentinels or nodes")
    if options.name and not options.sentinels:
        raise place.at("name").error(
            "names a group that Sentinels watch, but there are no sentinels; the cache's own name "
            "belongs above options"
        )


def check_near_cache(options: Options, near: NearCacheOptions, place: Location) -> None:
    """Raise ConfigError for overlapping prefixes, or reads of replicas beside a near cache."""
    if near.mode == "broadcast":
        here = place.at("prefixes")
        for (_, other), (i, one) in combinations(enumerate(near.prefixes), 2):
            if one.startswith(other) or other.startswith(one):
                raise here.item(i).error(
                    f"{shorten(one)} and {shorten(other)} overlap, which Redis refuses in the "
                    "mode broadcast; leave the longer one out"
                )
    if near.shared:
        _check_shared(options, near, place.at("shared"))
    for name, value, applies in (
        ("role", options.role, options.sentinels),
        ("scaleReads", options.scale_reads, options.nodes),
    ):
        if value in ("slave", "zone") and applies and near.required:
            raise place.error(
                f"with {name}: {value} every read goes to a replica, and reads of replicas are not "
                "cached; leave one of the two out"
            )


def _check_shared(options: Options, near: NearCacheOptions, place: Location) -> None:
    """Raise ConfigError for options that exclude a near cache of many processes."""
    if options.nodes:
        raise place.error(
            "is for one server; on a cluster each process has a near cache of its own, so leave it "
            "out"
        )
    if near.serve_stale:
        raise place.error(
            "and serveStale exclude each other: a record of another process isn't served after its "
            "time; leave one of them out"
        )
    if near.max_bytes < NEAR_SHARED_BYTES:
        raise place.error(
            f"needs maxBytes of at least {NEAR_SHARED_BYTES}, not {near.max_bytes}; write more, or "
            "leave it out"
        )


def check_cluster(options: Options, places: Mapping[str, Location]) -> None:
    """Refuse options that make no sense with ``nodes``, or without; log options without effect.

    ``places`` has the place of each option that is given. Raises ConfigError.
    """
    if options.nodes is None:
        _check_without_nodes(options, places)
        return
    shared = options.redis_options
    if options.db:
        raise places["db"].error(
            f"on a cluster, write redisOptions.db: {options.db} if it has several databases "
            "(Valkey 9 with cluster-databases), else leave out db"
        )
    if options.proxied:
        raise places["proxied"].error(
            "is for a proxy that hides the nodes of a cluster; leave out proxied or nodes"
        )
    if options.path:
        raise places["path"].error("a cluster has no socket; leave out the path or nodes")
    if options.scale_reads == "zone" and not options.zone:
        raise places["scaleReads"].error(
            "reads replicas in the program's own availability zone; write its name as zone: ..."
        )
    if options.zone is not None and options.scale_reads != "zone":
        raise places["zone"].error(
            "chooses replicas only with scaleReads: zone; write that, or leave it out"
        )
    if options.tls and shared.tls is None:
        # Ignoring it would send passwords and records in the clear.
        raise places["tls"].error("on a cluster redisOptions.tls is used; write it there")
    _, opened, tag = options.key_prefix.partition("{")
    if options.hash_tag and opened and (not tag or tag.startswith("}")):
        # After a lone "{", a name that begins with "}" makes the tag empty.
        raise places["keyPrefix"].error(
            "its { begins an empty hash tag, and a cluster would keep the two keys of a "
            'record in different slots; leave it out, or write a whole tag such as "{app}:"'
        )
    _log_no_effect_beside_nodes(options, places)


def _check_without_nodes(options: Options, places: Mapping[str, Location]) -> None:
    if options.nat_map and options.sentinels:
        raise places["natMap"].error(
            "is for the nodes of a cluster; configure the Sentinels to announce addresses that "
            "can be reached from here"
        )
    for name in ioredis.NEEDS_NODES:
        if name in places:
            _logger.info("%s has no effect: there are no nodes of a cluster", places[name])


def _log_no_effect_beside_nodes(options: Options, places: Mapping[str, Location]) -> None:
    reasons = ioredis.NO_EFFECT_BESIDE_NODES
    notes = {(places[name], why): name for name, why in reasons.items() if name in places}
    for (place, why), name in notes.items():
        # Ignoring the only password there is deserves a warning.
        missed = name in ("username", "password") and getattr(options.redis_options, name) is None
        level = logging.WARNING if missed else logging.INFO
        _logger.log(level, "%s has no effect on a cluster: %s", place, why)
