"""Whole Python processes: how they end with an engine alive, and Ctrl-C."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Processes see none of the test run's import hook, warnings filter, or handlers.
PREAMBLE = """
import asyncio, os, signal, sys, threading, time
import jaxengine
from tests.engine import tiny

[PROMPT] = tiny.prompts_of(6)
LONG = {{"max_new_tokens": None, "ignore_eos": True, "temperature": 0}}

def make_engine(**changes):
    return jaxengine.Engine(**tiny.engine_arguments(), **{{**{settings!r}, **changes}})

def sync_ids(engine, **params):
    params = {{"max_new_tokens": 12, "ignore_eos": True, "temperature": 0, **params}}
    return engine.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]
"""


def run_python(settings: dict[str, Any], code: str) -> subprocess.CompletedProcess:
    return run_script(PREAMBLE.format(settings=settings) + code)


def run_script(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        timeout=100,
    )


def assert_success(done: subprocess.CompletedProcess) -> None:
    assert (done.returncode, done.stderr) == (0, "")


EXITS = {
    "at once": "engine = make_engine()",
    "after a stream was begun": """
engine = make_engine()
chunks = engine.generate(input_ids=[PROMPT] * 20, sampling_params=LONG, stream=True)
next(chunks)
""",
    "while another thread generates": """
engine = make_engine()
def work():
    try:
        while True:
            engine.generate(input_ids=[PROMPT] * 20, sampling_params=LONG)
    except jaxengine.errors.EngineDeadError:
        pass
thread = threading.Thread(target=work, daemon=True)
thread.start()
while thread.is_alive() and not engine.stats()["num_running"]:
    time.sleep(0.001)
""",
    "while programs compile": """
from jaxengine.runtime.program_factory import ProgramFactory
os.cpu_count = lambda: 1  # compile one at a time
ProgramFactory.first = lambda self: ()  # and wait for none of them
engine = make_engine(executable_cache=False)
assert engine.stats()["programs"]["num_compiled"] == 0
""",
    "from a coroutine, by sys.exit": """
engine = make_engine()
async def main():
    task = asyncio.ensure_future(
        engine.async_generate(input_ids=[PROMPT] * 20, sampling_params=LONG)
    )
    await asyncio.sleep(0.01)
    sys.exit(0)
asyncio.run(main())
""",
}
TEN_EXITS = [*EXITS, "at once", "at once", *list(EXITS)[1:3], "while another thread generates"]


# Importing takes most of such a process's time, so it is done once: children are forked before
# there is an engine or a device, and go the whole way of an interpreter that ends.
FORKS = """
import json, tempfile
import jaxengine.engine

codes = {codes!r}
ended = []
for code in codes:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            break
        _, status = os.waitpid(child, 0)
        output.seek(0)
        ended.append((os.waitstatus_to_exitcode(status), output.read().decode()))
if child == 0:
    exec(code)
else:
    print(json.dumps(ended))
"""


@pytest.mark.timeout(300)
def test_interpreter_exits_without_shutdown_ten_times(settings: dict[str, Any], engine: Any):
    del engine  # it has filled the executable cache
    assert len(TEN_EXITS) == 10
    done = run_python(settings, FORKS.format(codes=[EXITS[how] for how in TEN_EXITS]))
    assert_success(done)
    ended = json.loads(done.stdout)
    assert list(zip(TEN_EXITS, ended, strict=True)) == [(how, [0, ""]) for how in TEN_EXITS]


CTRL_C = """
# A process started in the background of a shell ignores the signal, and its children do.
signal.signal(signal.SIGINT, signal.default_int_handler)
engine = make_engine()
pages = engine.stats()["num_free_pages"]
expected = sync_ids(engine)

def press(seconds):
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()

def is_interrupted(function):
    before = engine.stats()["num_generated_tokens"]
    press(0.05)
    try:
        function()
    except KeyboardInterrupt:
        pass
    else:
        return False
    deadline = time.monotonic() + 20
    while engine.stats()["num_running"] or engine.stats()["num_free_pages"] < pages:
        assert time.monotonic() < deadline, "requests go on after Ctrl-C"
        time.sleep(0.001)
    assert engine.stats()["num_waiting"] == 0
    assert engine.stats()["num_generated_tokens"] - before < 60 * 234 / 2
    return sync_ids(engine) == expected

def whole():
    engine.generate(input_ids=[PROMPT] * 60, sampling_params=LONG)

def streamed():
    for _ in engine.generate(input_ids=[PROMPT] * 60, sampling_params=LONG, stream=True):
        pass

async def in_a_coroutine():
    whole()

async def awaited():
    await engine.async_generate(input_ids=[PROMPT] * 60, sampling_params=LONG)

print(is_interrupted(whole), is_interrupted(streamed))
# A loop as notebooks have it; asyncio.run has a handler that waits for the coroutine to yield.
loop = asyncio.new_event_loop()
print(is_interrupted(lambda: loop.run_until_complete(in_a_coroutine())))
loop.close()
print(is_interrupted(lambda: asyncio.run(awaited())))
"""


def test_ctrl_c_stops_the_call_and_not_the_engine(settings: dict[str, Any], engine: Any):
    del engine
    done = run_python(settings, CTRL_C)
    assert_success(done)
    assert done.stdout.split() == ["True"] * 4


CTRL_C_AT_START = """
signal.signal(signal.SIGINT, signal.default_int_handler)

def own_threads():
    threads = [t for t in threading.enumerate() if t.name.startswith("jaxengine")]
    return [thread.name for thread in threads if thread.is_alive()]

def interrupt():
    while not own_threads():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
os.cpu_count = lambda: 1  # compile one at a time
try:
    # jax may swallow the interrupt in a callback; then there is an engine, which nobody holds.
    make_engine(executable_cache=False)
except KeyboardInterrupt:
    pass
deadline = time.monotonic() + 20
while own_threads() and time.monotonic() < deadline:
    time.sleep(0.01)
print(own_threads())
"""


def test_ctrl_c_while_an_engine_starts_leaves_nothing_behind(settings: dict[str, Any]):
    done = run_python(settings, CTRL_C_AT_START)
    assert_success(done)
    assert done.stdout.endswith("[]\n")
