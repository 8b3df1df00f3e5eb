"""Run Django's own tests of caches on ``dscache.django``; print the outcome as JSON.

    python tests/programs/django_suite.py FOLDER URL OPTIONS

OPTIONS are JSON. FOLDER has the packages ``cache`` and ``sessions_tests`` of Django's sources.
"""

from __future__ import annotations

import contextlib
import json
import sys
import unittest
from collections.abc import Iterator
from typing import Any

FOLDER, URL = sys.argv[1:3]
OPTIONS = json.loads(sys.argv[3])
OURS = {"BACKEND": "dscache.django.RecordCache", "LOCATION": URL}
DATABASE = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
# They are written for any backend, and run on one in the process by default.
OF_MIDDLEWARE = (
    *("CacheHEADTest", "CacheI18nTest", "PrefixedCacheI18nTest", "CacheUtils"),
    *("PrefixedCacheUtils", "CacheMiddlewareTest", "TestWithTemplateResponse"),
)


def configure() -> None:
    import django
    from django.conf import settings

    settings.configure(
        ALLOWED_HOSTS=["testserver"],
        CACHES={"default": OURS | {"OPTIONS": OPTIONS}},
        DATABASES={"default": DATABASE, "other": DATABASE},
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        INSTALLED_APPS=["django.contrib.sessions", "cache", "sessions_tests"],
        LANGUAGE_CODE="en",
        ROOT_URLCONF=[],
        SECRET_KEY="of tests",
        TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
        USE_TZ=False,
    )
    django.setup()


def cases() -> Iterator[type[unittest.TestCase]]:
    """Yield the classes of Django's tests, with caches of ours."""
    from cache import tests
    from django.test import TestCase, override_settings

    # As for Django's own RedisCache: Redis evicts by itself.
    own = tests.caches_setting_for_tests(base=OURS, exclude={"cull", "zero_cull"}, OPTIONS=OPTIONS)
    base = type("RecordCacheTests", (tests.BaseCacheTests, TestCase), {})
    yield override_settings(CACHES=own)(base)
    if OPTIONS["SERIALIZER"] == "pickle":
        for name in OF_MIDDLEWARE:
            theirs = getattr(tests, name)
            own = {
                alias: settings | OURS | {"OPTIONS": OPTIONS, "KEY_PREFIX": f"{name} {alias}"}
                for alias, settings in theirs._overridden_settings["CACHES"].items()
            }
            yield override_settings(CACHES=own)(type(name, (theirs,), {}))
    from sessions_tests import tests as sessions

    yield sessions.CacheSessionTests
    yield sessions.CacheDBSessionTests


def main() -> None:
    sys.path.insert(0, FOLDER)
    configure()
    from django.test.runner import DiscoverRunner

    loader = unittest.defaultTestLoader
    suite = unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in cases())
    runner = DiscoverRunner(verbosity=0, interactive=False)
    with contextlib.redirect_stdout(sys.stderr):
        databases = runner.setup_databases()
        outcome = unittest.TextTestRunner(sys.stderr).run(suite)
        runner.teardown_databases(databases)
    wrong = [*outcome.failures, *outcome.errors]
    told: dict[str, Any] = {
        "ran": outcome.testsRun,
        "failed": {name_of(test): text for test, text in wrong},
        "skipped": {name_of(test): text for test, text in outcome.skipped},
    }
    print(json.dumps(told))


def name_of(test: unittest.TestCase) -> str:
    return ".".join(test.id().rsplit(".", 2)[-2:])


if __name__ == "__main__":
    main()
