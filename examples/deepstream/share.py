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
            version = await cache.head(name)
            # if_newer keeps the version that deepstream may have written in between.
            if not await cache.set(
                name, 1 if version is None else version + 1, data, if_newer=True
            ):
                sys.exit(f"{name} has changed in the meantime: read it, and try again")
        record = await cache.get(name)
        print(name, record and f"{record.version} {record.raw.decode()}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python share.py NAME [JSON]")
    try:
        asyncio.run(main(*sys.argv[1:3]))
    except dscache.DscacheError as error:  # no Redis, or a variable of the configuration is missing
        sys.exit(f"share.py: {error}")
