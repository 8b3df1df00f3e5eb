"""Read and write the records that a deepstream server keeps in Redis.

    python share.py NAME          prints the record
    python share.py NAME JSON     writes the record first, as its next version

The configuration is deepstream's own file, config.yml in the same folder.
"""

import asyncio
import sys
from pathlib import Path

import msgspec

import dscache

CONFIG = Path(__file__).with_name("config.yml")


async def main(name: str, json: str | None = None) -> None:
    async with dscache.AsyncCache.from_config(CONFIG) as cache:
        if json is not None:
            try:
                data = msgspec.json.decode(json)
            except msgspec.DecodeError as error:
                sys.exit(f"{json} is not JSON: {error}")
            # It gets the version after the one that deepstream wrote last.
            await cache.update(name, lambda _: data, default=None)
        record = await cache.get(name)
        print(name, record and f"{record.version} {record.raw.decode()}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python share.py NAME [JSON]")
    try:
        asyncio.run(main(*sys.argv[1:3]))
    except dscache.DscacheError as error:  # no Redis, or a variable of the configuration is missing
        sys.exit(f"share.py: {error}")
