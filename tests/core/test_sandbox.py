"""Programs that try to get out of the sandbox, or to bring the machine down from inside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fledge.core import sandbox
from fledge.core.errors import FledgeError
from fledge.core.sandbox import Limits, run_python, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"programs cannot be confined here: {why_not()}")


def outcome(code: str, **limits: float) -> sandbox.Ran:
    return run_python(code, Limits(**limits))  # type: ignore[arg-type]


def test_what_a_program_prints() -> None:
    assert outcome("print(6 * 7); print('数')") == sandbox.Ran("42\n数\n", "", "ok")
    ran = outcome("print('before'); raise ValueError('没有')")
    assert ran.status == "error" and ran.output == "before\n" and ran.errors.endswith("ValueError: 没有\n")
    assert outcome("import sys; sys.exit(3)").status == "error"
    assert outcome("print(input())").errors.endswith("EOFError: EOF when reading a line\n")
    assert outcome("import statistics, json, re; print(statistics.mean([1, 2]))").output == "1.5\n"


def test_no_network() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=2).close()  # from here it is there
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert outcome(code).errors.strip().endswith("Network is unreachable")
    code = "import os; print(os.listdir('/sys/class/net') if os.path.exists('/sys') else 'none')"
    assert outcome(code).output == "none\n"
    abstract = "\0fledge-sandbox-test"
    with socket.socket(socket.AF_UNIX) as server:  # abstract addresses belong to the network namespace
        server.bind(abstract)
        server.listen()
        assert outcome(f"import socket; socket.socket(socket.AF_UNIX).connect({abstract!r})").status == "error"


def test_no_files_but_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret", encoding="utf-8")
    places = [
        str(secret),
        __file__,
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/1/root/etc/passwd",
        os.path.expanduser("~"),
    ]
    tries = f"""
import os
for place in {places!r}:
    for mode in ("r", "w"):
        try:
            open(place, mode)
            print("opened", place, mode)
        except OSError:
            pass
needed = {sandbox._python()["needs"]!r}
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in needed]
    print(*(file for name in files if (file := os.path.join(folder, name)) not in needed), end="")
"""
    ran = outcome(tries)
    assert (ran.output, ran.status) == ("/box/program.py", "ok")
    assert secret.read_text(encoding="utf-8") == "a secret"


def test_the_interpreters_files_cannot_be_written() -> None:
    code = "import os, json; print(os.access(json.__file__, os.W_OK)); open(json.__file__, 'a')"
    ran = outcome(code)
    assert ran.output == "False\n" and ("Read-only" in ran.errors or "Permission" in ran.errors)
    assert outcome("open('/new', 'w')").status == "error"
    assert outcome("open('mine', 'w').write('x'); print(open('mine').read())").output == "x\n"


def test_no_environment_and_no_file_of_ours_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_SECRET", "a secret")
    assert outcome("import os; print({k: v for k, v in os.environ.items() if k != 'LC_CTYPE'})").output == "{}\n"
    code = """
import os
for number in range(3, 32):
    try:
        os.fstat(number)
        print("open", number)
    except OSError:
        pass
"""
    assert outcome(code).output == ""


def test_it_has_no_rights_and_gets_none() -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print([libc.unshare(flag) for flag in (0x10000000, 0x00020000, 0x40000000)])
print(libc.mount(b"none", b"/box", b"tmpfs", 0, None), libc.chroot(b"/box"), libc.umount2(b"/box", 2))
print(libc.sethostname(b"x", 1), libc.mknod(b"disk", 0o60600, 0x800), libc.setuid(12345), libc.ptrace(16, 1, 0, 0))
"""
    assert outcome(code).output == "[-1, -1, -1]\n-1 -1 -1\n-1 -1 -1 -1\n"


def test_it_sees_no_other_process_and_cannot_stop_its_watcher() -> None:
    code = "import os, signal; print(os.getpid(), os.getppid()); os.kill(1, signal.SIGKILL); print('still here')"
    ran = outcome(code)
    assert ran.output.startswith("2 1\n") and ("still here" in ran.output or "not permitted" in ran.errors)


def test_an_endless_loop_ends() -> None:
    begun = time.monotonic()
    assert outcome("print('on', flush=True)\nwhile True: pass", seconds=1.0).status == "timeout"
    assert time.monotonic() - begun < 5
    assert outcome("while True: pass", cpu_seconds=1, seconds=30).status == "timeout"
    ran = outcome("print('on', flush=True)\nimport time; time.sleep(60)", seconds=0.5)
    assert (ran.output, ran.status) == ("on\n", "timeout")


def test_memory_is_limited() -> None:
    ran = outcome("x = bytearray(10**9)", memory=256 * 2**20)
    assert ran.status == "error" and "MemoryError" in ran.errors
    lasting = "import ctypes as c; c = c.CDLL(None); print(c.shmget(0, 9, 896), c.msgget(0, 896), c.semget(0, 1, 896))"
    assert outcome(lasting).output == "-1 -1 -1\n"  # System V memory is nobody's: no limit of a process counts it
    assert outcome("x = []\nwhile True: x.append(bytes(10**6))", memory=256 * 2**20).status == "error"


def test_files_are_limited() -> None:
    ran = outcome("open('big', 'wb').write(bytes(8 * 2**20))", disk=2**20)
    assert ran.status == "error"
    many = "for n in range(100): open(f'f{n}', 'wb').write(bytes(2**19))"
    assert "No space left" in outcome(many, disk=2**20).errors
    assert "Too many open files" in outcome("x = [open(f'f{n}', 'w') for n in range(100)]").errors


def test_a_fork_bomb_fizzles_out() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert outcome(bomb, seconds=1.0).status == "timeout"
    count = """
import os, time
made = 0
for _ in range(50):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
    except OSError:
        break
print(made)
"""
    ran = outcome(count, seconds=10, processes=8)
    assert int(ran.output) <= 7 and ran.status == "ok"


def test_nothing_is_left_behind() -> None:
    mark = f"left-behind-{os.getpid()}-{time.monotonic_ns()}"
    code = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        name = {mark!r}
        time.sleep(300)
    os._exit(0)
print("done")
"""
    begun = time.monotonic()
    assert outcome(code).output == "done\n" and time.monotonic() - begun < 5
    time.sleep(0.2)
    assert sum(_children_of_sandbox()) == 0


def _children_of_sandbox(parent_id: int = 0) -> list[bool]:
    """Processes that run a sandbox's program or walls and are children of `parent_id`, else ours or nobody's."""
    parents = (str(parent_id),) if parent_id else ("1", str(os.getpid()))
    mine = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            mine.append(("/box/program.py" in line or "confine.py" in line) and parent in parents)
    return mine


def test_output_without_end_is_cut_off() -> None:
    ran = outcome("while True: print('x' * 1000)", seconds=1.0, output=10_000)
    assert len(ran.output) == 10_000 and ran.status == "timeout"


def test_several_at_once() -> None:
    found: dict[int, str] = {}

    def run(number: int) -> None:
        found[number] = outcome(f"print({number})").output

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"{number}\n" for number in range(6)}


def test_code_that_is_not_text_or_not_python() -> None:
    assert "SyntaxError" in outcome("this is not a program").errors
    assert outcome("").status == "ok" and outcome("x = '\ud800'").status == "error"


def test_it_refuses_where_it_cannot_confine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox inside the sandbox has no namespaces to make: nothing may be run there."""
    inside = Path(sandbox.__file__).with_name("confine.py").read_text(encoding="utf-8")
    order = '{"code": "print(1)", "python": {"executable": "x", "needs": []}, "limits": {}, "parent": 1}'
    code = f"""
import io, sys
class Fed: buffer = io.BytesIO({order.encode()!r})
sys.stdin = Fed
space = {{"__name__": "confine"}}
code = compile({inside!r}, "confine.py", "exec")
exec(code, space)
print(space["main"]())
"""
    ran = outcome(code)
    assert ran.output == f"{sandbox._REFUSED}\n" and ran.errors
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(FledgeError, match="cannot confine"):
        run_python("print(1)")


def test_it_dies_with_whoever_started_it() -> None:
    code = "from fledge.core import sandbox as s; s.run_python('import time; time.sleep(60)', s.Limits(seconds=90))"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not any(_children_of_sandbox(process.pid)):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(0.3)
    assert sum(_children_of_sandbox()) == 0
