"""The walls of the sandbox, from inside: `python -I -S confine.py < order.json`. Uses the standard library only.

Three processes stand in a row. This one enters new namespaces and waits. Its child, the first process of the new
process namespace, builds the file system and waits, too: when it ends, the kernel ends all that are left inside. The
grandchild gives up every right and becomes the program. Each dies with the one before it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

REFUSED = 97  # the exit status that says: nothing was run

NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET"""
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 1, 4, 28, 38
NO_RIGHTS_OF_ROOT = 0xEF  # securebits: user 0 gets no capability by being user 0, for good
STAT_FLAGS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
"""What statvfs calls nosuid, nodev, noexec, noatime, nodiratime, relatime → what mount does"""

SYSTEM_V = ("kernel/shmmni", "kernel/shmmax", "kernel/shmall", "kernel/msgmni", "kernel/msgmax", "kernel/msgmnb")
BOX = "/box"
INSIDE, NOBODY = 1000, 65534

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    order = json.loads(sys.stdin.buffer.read())
    die_with_parent(order["parent"])
    real_root = os.geteuid() == 0
    try:
        enter_namespaces(real_root)
        child = os.fork()
    except OSError as error:
        return refuse(error)
    if child:
        return status_of(child)
    try:
        die_with_parent(os.getppid())
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))  # should all who could end us be gone
        signal.alarm(int(order["limits"]["seconds"]) + 2)
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # nothing inside may look into the one that watches
        forbid_kernel_objects()
        build_file_system(order["python"]["needs"], order["limits"], order["code"])
    except OSError as error:
        os._exit(refuse(error))
    program = os.fork()
    if program == 0:
        try:
            become(order["python"], order["limits"], real_root)
        except OSError as error:
            os._exit(refuse(error))
    os._exit(status_of(program))


def refuse(error: OSError) -> int:
    sys.stderr.write(f"{error.strerror or error} ({error.filename or 'namespaces'})\n")
    sys.stderr.flush()
    return REFUSED


def call(name: str, *arguments: object) -> None:
    """A function of the C library; raises OSError with its name."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def die_with_parent(parent: int) -> None:
    """End when `parent` ends; now, where it has ended already."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(REFUSED)


def status_of(child: int) -> int:
    """Wait; a signal becomes 128 + its number."""
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def enter_namespaces(real_root: bool) -> None:
    """No network, own processes, own mounts; inside we are root, with rights over nothing but the inside.

    The real root is exempt from the limit on processes, so where we are root the program gets another user than ours.
    """
    user, group, parent = os.geteuid(), os.getegid(), os.getpid()
    mapper = 0
    if real_root:  # two users in the map: only someone outside the new namespace may write it
        ready = os.pipe()
        mapper = os.fork()
        if mapper == 0:
            os.close(ready[1])
            os.read(ready[0], 1)
            try:
                write(f"/proc/{parent}/uid_map", f"0 0 1\n{INSIDE} {NOBODY} 1\n")
                write(f"/proc/{parent}/gid_map", f"0 0 1\n{INSIDE} {NOBODY} 1\n")
                os._exit(0)
            except OSError:
                os._exit(1)
    call("unshare", NEW_NAMESPACES)
    if real_root:
        os.write(ready[1], b"x")
        if status_of(mapper) != 0:
            raise OSError(1, "users could not be mapped", "uid_map")
        for pipe in ready:
            os.close(pipe)
    else:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {user} 1\n")
        write("/proc/self/gid_map", f"0 {group} 1\n")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    call("mount", *encoded, ctypes.c_ulong(flags), options.encode() if options else None)


def build_file_system(needs: list[str], limits: dict[str, float], code: str) -> None:
    """A root in memory with the interpreter's files, read-only, and `/box` to write in; everything else is gone."""
    folders = ("/mnt", "/media", "/srv", "/tmp", "/opt")
    root = next(f for f in folders if os.path.isdir(f) and not any(path.startswith(f + "/") for path in needs))
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in needs:
        show(path, root)
    os.mkdir(root + BOX)
    mount("tmpfs", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"mode=777,size={int(limits['disk'])}")
    with open(root + BOX + "/program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(code)
    os.chdir(root)
    pivot_root()
    mount("none", "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(BOX)


def pivot_root() -> None:
    """Make the current folder the root and let go of the old one. The C library has no name for it, only the number."""
    number = {"x86_64": 155, "aarch64": 41, "riscv64": 41}.get(os.uname().machine)
    if number is None:
        raise OSError(38, "unknown processor", os.uname().machine)
    here = ctypes.c_char_p(b".")
    if libc.syscall(ctypes.c_long(number), here, here) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "pivot_root")
    call("umount2", b".", MNT_DETACH)  # the old root, which lay over the new one


def show(path: str, root: str) -> None:
    """Make a file or folder of the machine visible at the same place, read-only; a link stays a link."""
    target = root + path
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(path, target, None, MS_BIND | MS_REC)
    kept = sum(flag for bit, flag in STAT_FLAGS.items() if os.statvfs(target).f_flag & bit)
    mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def forbid_kernel_objects() -> None:
    """No namespaces below ours, through which more of the kernel could be reached; no System V memory, message queues
    and semaphores, which outlive their process and count for no limit of it."""
    namespaces = [
        f"user/max_{kind}_namespaces" for kind in ("user", "mnt", "net", "pid", "ipc", "uts", "cgroup", "time")
    ]
    for switch, value in [(name, "0") for name in (*namespaces, *SYSTEM_V)] + [("kernel/sem", "0 0 0 0")]:
        try:
            write(f"/proc/sys/{switch}", value)
        except OSError:  # a kernel without that switch, or a read-only /proc: the other walls stand
            continue


def become(python: dict[str, str], limits: dict[str, float], real_root: bool) -> None:
    """Limits first, then no rights and no way to new ones, then the program."""
    os.setsid()
    bounds = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["disk"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in bounds.items():
        grace = kind == resource.RLIMIT_CPU  # a second between the signal that says so and the one that ends all
        resource.setrlimit(kind, (int(bound), int(bound) + grace))
    if real_root:
        os.setgroups([])
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    else:
        call("prctl", PR_SET_SECUREBITS, NO_RIGHTS_OF_ROOT, 0, 0, 0)
    watchers = 0 if real_root else 2  # of the same user as the program, then
    resource.setrlimit(resource.RLIMIT_NPROC, (int(limits["processes"]) + watchers,) * 2)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent(os.getppid())  # last: a change of user takes the wish back
    null, other = os.pipe()
    os.dup2(null, 0)
    for pipe in (null, other):
        os.close(pipe)
    arguments = [python["executable"], "-I", "-S", "-B", "-X", "utf8", BOX + "/program.py"]
    os.execve(python["executable"], arguments, {})


if __name__ == "__main__":
    sys.exit(main())
