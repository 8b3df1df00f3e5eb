"""``dscache migrate``: records from one key layout to the other, online."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from ..admin.cache import AdminCache, open_cache
from ..admin.key_layout import DEEPSTREAM, HASHTAG, Layout
from ..admin.migration import Count, Migration
from ..admin.one_key import OneKeyMigration
from ..admin.primaries import open_primaries
from ..admin.progress import with_long_timeouts
from ..errors import shorten
from .job_summary import RESUMES, run_timed
from .options import Chosen, PrefixOption, flag, with_options
from .output import complain_of_all, number, print_json
from .progress_bar import progress
from .settings import shown, with_layout
from .words import quotable


class _To(StrEnum):
    DEEPSTREAM = DEEPSTREAM
    HASHTAG = HASHTAG


class _From(StrEnum):
    DEEPSTREAM3 = "deepstream3"


_ONE_KEY = "one-key"


@with_options("config", "url", "json")
def migrate(
    to: Annotated[
        _To | None,
        typer.Option(
            metavar="LAYOUT",
            help="The new key layout: hashtag or deepstream. With --from, the default is the "
            "configured one.",
            show_default=False,
        ),
    ] = None,
    source_layout: Annotated[
        _From | None,
        typer.Option(
            "--from",
            metavar="LAYOUT",
            help="deepstream3: move the records of deepstream 1 to 3, each under one key.",
            show_default=False,
        ),
    ] = None,
    prefix: PrefixOption = "",
    dry_run: Annotated[bool, flag("--dry-run", "Count records, and change nothing.")] = False,
    keep: Annotated[
        bool, flag("--keep", "Copy and verify, and keep the keys of the old layout.")
    ] = False,
    yes: Annotated[
        bool, flag("--yes", "Don't ask before keys are removed; needed without a terminal.")
    ] = False,
    *,
    chosen: Chosen,
) -> None:
    """Move records to another key layout, while servers stay in use.

    With --from deepstream3, it moves the records of deepstream 1 to 3 to the two keys of newer
    versions; their versions stay.

    Copies each record unless the new layout has a version as new, verifies the copy, and removes
    the old keys if they are unchanged. While processes still write the old layout: run it with
    --keep, configure them with the new layout, and run it without. It can be interrupted and run
    again at any time. The exit status is 1 if records remain in the old layout.
    """
    if to is None and source_layout is None:
        raise typer.BadParameter(
            "give the new layout, hashtag or deepstream, or --from deepstream3", param_hint="--to"
        )
    must_ask = not (dry_run or keep or yes)
    if must_ask and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise typer.BadParameter(
            "add --yes: without a terminal nobody can be asked whether keys may be removed; "
            "--dry-run and --keep remove none",
            param_hint="--yes",
        )
    config = with_long_timeouts(chosen.load())
    count = Count()
    target_layout = ""
    if must_ask:
        prefixed = f" beginning with {shorten(prefix)}" if prefix else ""
        destination = f"the {to.value} layout" if to else "two keys each"
        typer.confirm(
            f"Move all records{prefixed} at {quotable(shown(config))} to {destination}, and "
            "remove their old keys?",
            abort=True,
            err=True,
        )

    async def work() -> str:
        """Migrate; return the key layout that is configured."""
        nonlocal target_layout
        old = DEEPSTREAM if to is _To.HASHTAG else HASHTAG
        if source_layout is not None:
            old = config.options.key_layout
        async with open_cache(with_layout(config, old)) as source:
            # On a cluster, which the source may have turned out to be, "auto" is hashtag.
            configured = Layout.of(
                with_layout(source.config, config.options.key_layout).options
            ).kind
            target_layout = configured if to is None else to.value
            async with (
                AdminCache(with_layout(source.config, target_layout)) as target,
                open_primaries(source) as primaries,
            ):
                kind = Migration if source_layout is None else OneKeyMigration
                job = kind(source, target, primaries, prefix=prefix, count=count, keep=keep)
                with progress("migrate", count.position):
                    await (job.count() if dry_run else job.run())
        return configured

    configured, seconds = run_timed(work(), RESUMES)
    complain_of_all(count.notes, count.left)
    summary = _document(count, dry_run=dry_run, keep=keep, seconds=seconds)
    if chosen.as_json:
        print_json(summary)
    else:
        old = DEEPSTREAM if target_layout == HASHTAG else HASHTAG
        old = old if source_layout is None else _ONE_KEY
        for line in _page(count, old, target_layout, dry_run=dry_run, keep=keep):
            typer.echo(line)
        if configured != target_layout and not dry_run:
            typer.echo(
                f"configure keyLayout: {target_layout} for all processes that read or write them"
            )
    if not summary["ok"]:
        raise typer.Exit(1)


def _document(count: Count, *, dry_run: bool, keep: bool, seconds: float) -> dict[str, object]:
    """Return the result as the JSON document to print."""
    return {
        "ok": dry_run or not (count.left or (count.unexplained and not keep)),
        "dry_run": dry_run,
        "found": count.records,
        "copied": count.copied,
        "present": count.present,
        "removed": count.removed,
        "changing": count.changing,
        "conflicts": count.conflicts,
        "ambiguous": count.ambiguous,
        "damaged": count.damaged,
        "halves": count.halves,
        "already": count.already if dry_run else None,
        "remaining": None if dry_run or keep else count.remaining,
        "seconds": round(seconds, 3),
    }


def _page(count: Count, old: str, to: str, *, dry_run: bool, keep: bool) -> list[str]:
    """Return the result as lines for a terminal."""
    lines = [f"{number(count.records, 'record')} found in the {old} layout"]
    if dry_run:
        lines += [
            f"{count.copied:,} would be copied",
            f"{count.present:,} are in the {to} layout too, the same or newer",
            f"{number(count.already, 'record')} seen in the {to} layout",
        ]
    else:
        lines += [
            f"{count.copied:,} copied to the {to} layout",
            f"{count.present:,} were there already, the same or newer",
            f"{count.removed:,} removed from the {old} layout",
        ]
    for left, why in (
        (count.halves, "halves, with one of two keys missing"),
        (count.damaged, "damaged"),
        (count.ambiguous, "with keys that mean another record in the other layout"),
        (count.conflicts, "of the same version with other data in the other layout"),
        (count.changing, "changing all the time"),
    ):
        if left:
            lines.append(f"{left:,} {'will be ' if dry_run else ''}left: {why}")
    if not dry_run and not keep:
        if count.unexplained:
            lines.append(
                f"{number(count.unexplained, 'record')} written in the {old} layout meanwhile: "
                "configure the processes that write them, and run this again"
            )
        elif not count.left:
            lines.append(f"no whole record is left in the {old} layout")
    return lines
