from __future__ import annotations

import logging
import re
import subprocess
import sys

from services.core.logging_setup import LineFormatter


def line(message: str, *args: object, **kwargs: object) -> str:
    record = logging.LogRecord(
        "a.logger",
        logging.WARNING,
        "f.py",
        1,
        message,
        args,
        kwargs.get("exc_info"),  # type: ignore[arg-type]
    )
    return LineFormatter(service="svc", instance="i1").format(record)


def test_a_record_is_one_line_with_time_level_and_origin() -> None:
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING svc\[i1\] a\.logger: 3 of 4"
    assert re.fullmatch(pattern, line("%d of %d", 3, 4))


def test_a_message_cannot_forge_a_record() -> None:
    assert len(line("name %s", "x\n2026-01-01 ERROR\r\nforged").splitlines()) == 1


def test_a_traceback_follows_indented() -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        text = line("failed", exc_info=sys.exc_info())
    first, *rest = text.splitlines()
    assert first.endswith("failed")
    assert any("ValueError: broken" in entry for entry in rest)
    assert all(entry.startswith("    ") for entry in rest)


def test_a_configured_process_logs_to_stderr_and_keeps_chatty_libraries_quiet() -> None:
    code = (
        "import logging, warnings\n"
        "from services.core.logging_setup import configure_logging\n"
        "configure_logging('info', service='svc', instance='i1')\n"
        "logging.getLogger('services.x').info('heard')\n"
        "logging.getLogger('services.x').debug('too quiet')\n"
        "logging.getLogger('httpx').info('chatter')\n"
        "logging.getLogger('httpx').warning('trouble')\n"
        "warnings.warn('old way')\n"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout == ""
    texts = [text.split("svc[i1] ", 1)[1] for text in seen.stderr.splitlines()]
    assert texts[:2] == ["services.x: heard", "httpx: trouble"]
    assert "old way" in texts[2]
    assert len(texts) == 3
