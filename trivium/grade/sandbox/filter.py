"""Which system calls a walled-in program may make, as a filter the kernel runs (classic BPF)."""

import errno
import struct

# Numbers from the kernel's own headers (asm/unistd_64.h, asm-generic/unistd.h). What is not listed is
# refused: sockets, fork and exec, kill, ptrace, mounts, namespaces, keys, bpf, io_uring and what comes next.
_CALLS: dict[str, dict[str, int]] = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "open": 2, "openat": 257, "stat": 4, "lstat": 6, "fstat":
        5, "newfstatat": 262, "statx": 332, "access": 21, "faccessat": 269, "faccessat2": 439,
        "readlink": 89, "readlinkat": 267, "lseek": 8, "pread64": 17, "pwrite64": 18, "readv": 19,
        "writev": 20, "mmap": 9, "mprotect": 10, "munmap": 11, "mremap": 25, "madvise": 28, "brk":
        12, "membarrier": 324, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "rt_sigpending": 127, "rt_sigtimedwait": 128, "sigaltstack": 131, "restart_syscall": 219,
        "alarm": 37, "setitimer": 38, "getitimer": 36, "pause": 34, "sched_yield": 24,
        "sched_getaffinity": 204, "nanosleep": 35, "clock_nanosleep": 230, "clock_gettime": 228,
        "clock_getres": 229, "gettimeofday": 96, "time": 201, "times": 100, "getrusage": 98,
        "sysinfo": 99, "uname": 63, "getpid": 39, "gettid": 186, "getppid": 110, "getuid": 102,
        "geteuid": 107, "getgid": 104, "getegid": 108, "getgroups": 115, "getpgrp": 111, "getpgid":
        121, "getsid": 124, "getpriority": 140, "getrlimit": 97, "umask": 95, "dup": 32, "dup2": 33,
        "dup3": 292, "fcntl": 72, "close_range": 436, "pipe": 22, "pipe2": 293, "eventfd2": 290,
        "poll": 7, "ppoll": 271, "select": 23, "pselect6": 270, "epoll_create1": 291, "epoll_ctl":
        233, "epoll_wait": 232, "epoll_pwait": 281, "futex": 202, "futex_waitv": 449,
        "set_robust_list": 273, "rseq": 334, "set_tid_address": 218, "exit":
        60, "exit_group": 231, "getrandom": 318, "getdents64": 217, "getcwd": 79, "chdir": 80,
        "fchdir": 81, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "unlink": 87, "unlinkat": 263,
        "rename": 82, "renameat": 264, "renameat2": 316, "symlink": 88, "symlinkat": 266,
        "ftruncate": 77, "truncate": 76, "fsync": 74, "fdatasync": 75, "utimensat": 280, "statfs":
        137, "fstatfs": 138, "copy_file_range": 326, "fadvise64": 221, "flock": 73, "clone": 56,
        "clone3": 435, "tgkill": 234, "prlimit64": 302, "ioctl": 16,
    },
    "aarch64": {
        "read": 63, "write": 64, "close": 57, "openat": 56, "fstat": 80, "newfstatat": 79, "statx":
        291, "faccessat": 48, "faccessat2": 439, "readlinkat": 78, "lseek": 62, "pread64": 67,
        "pwrite64": 68, "readv": 65, "writev": 66, "mmap": 222, "mprotect": 226, "munmap": 215,
        "mremap": 216, "madvise": 233, "brk": 214, "membarrier": 283, "rt_sigaction": 134,
        "rt_sigprocmask": 135, "rt_sigreturn": 139, "rt_sigpending": 136, "rt_sigtimedwait": 137,
        "sigaltstack": 132, "restart_syscall": 128, "setitimer": 103, "getitimer": 102,
        "sched_yield": 124, "sched_getaffinity": 123, "nanosleep": 101, "clock_nanosleep": 115,
        "clock_gettime": 113, "clock_getres": 114, "gettimeofday": 169, "times": 153, "getrusage":
        165, "sysinfo": 179, "uname": 160, "getpid": 172, "gettid": 178, "getppid": 173, "getuid":
        174, "geteuid": 175, "getgid": 176, "getegid": 177, "getgroups": 158, "getpgid": 155,
        "getsid": 156, "getpriority": 141, "getrlimit": 163, "umask": 166, "dup": 23, "dup3": 24,
        "fcntl": 25, "close_range": 436, "pipe2": 59, "eventfd2": 19, "ppoll": 73, "pselect6": 72,
        "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "futex": 98, "futex_waitv": 449,
        "set_robust_list": 99, "rseq": 293, "set_tid_address": 96, "exit":
        93, "exit_group": 94, "getrandom": 278, "getdents64": 61, "getcwd": 17, "chdir": 49,
        "fchdir": 50, "mkdirat": 34, "unlinkat": 35, "renameat": 38, "renameat2": 276, "symlinkat":
        36, "ftruncate": 46, "truncate": 45, "fsync": 82, "fdatasync": 83, "utimensat": 88,
        "statfs": 43, "fstatfs": 44, "copy_file_range": 285, "fadvise64": 223, "flock": 32, "clone":
        220, "clone3": 435, "tgkill": 131, "prlimit64": 261, "ioctl": 29,
    },
}  # fmt: skip

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE = 0, 4
_X32 = 0x40000000
_THREAD = 0x00010000
# The flags of clone that make a namespace; a thread needs none of them.
_NEW_NAMESPACES = 0x7E020080
_ASYNCHRONOUS = 0x2000
# fcntl's commands: copy a descriptor, its flags, its status flags, locks, the size of a pipe. Not among them:
# owners and signals of a descriptor (which reach other processes), leases, notifications, seals.
_COPY_AND_FLAGS, _SET_STATUS, _LOCKS, _PIPE_SIZE = (0, 1, 2, 3, 1030), 4, (5, 6, 7, 36, 37, 38), (1032,)
# What takes a path or works on files: with namespaces there is only the scratch folder to reach; without them
# these calls would see, and some of them change whatever Landlock says, every file of the user.
_PATHS = frozenset(
    (
        "open", "openat", "getcwd", "getdents64", "stat", "lstat", "newfstatat", "statx", "access",
        "faccessat", "faccessat2", "readlink", "readlinkat", "chdir", "fchdir", "mkdir", "mkdirat",
        "rmdir", "unlink", "unlinkat", "rename", "renameat", "renameat2", "symlink", "symlinkat",
        "truncate", "ftruncate", "utimensat", "statfs", "copy_file_range", "flock",
    )
)  # fmt: skip
# What asks about any process by its number.
_PROCESSES = frozenset(("getpgid", "getsid", "getpriority"))
_OF_ITSELF = frozenset(("sched_getaffinity",))
_DONE_ALREADY = frozenset(("fsync", "fdatasync"))

Line = tuple[int, int, int, int]


def known_machine(machine: str) -> bool:
    """Whether there is a list of calls for this processor."""
    return machine in _CALLS


def filter_program(machine: str, process: int, own_files: bool) -> bytes:
    """The filter for this processor and the process with that number, as an array of struct sock_filter.

    `own_files` says that the program sees a file system of its own, in which it may do what it likes.
    """
    calls = dict(_CALLS[machine])
    if not own_files:
        calls = {name: number for name, number in calls.items() if name not in _PATHS | _PROCESSES}
    rules: dict[str, list[Line]] = {
        # Threads, but no processes: a bomb needs forks, and so does a daemon that outlives its parent.
        "clone": [
            _argument(0),
            (_ANY_BIT, 0, 2, _THREAD),
            (_ANY_BIT, 1, 0, _NEW_NAMESPACES),
            _answer(_ALLOW),
        ],
        # The flags of clone3 lie in memory, where a filter cannot look; without it the C library uses clone.
        "clone3": [_answer(_REFUSE | errno.ENOSYS)],
        "ioctl": [_answer(_REFUSE | errno.ENOTTY)],
        "tgkill": [_argument(0), (_EQUAL, 0, 1, process), _answer(_ALLOW)],
        # Limits may be read, never set, and only its own.
        "prlimit64": [
            _argument(2),
            (_EQUAL, 0, 6, 0),
            _argument(2, upper=True),
            (_EQUAL, 0, 4, 0),
            _argument(0),
            (_EQUAL, 1, 0, 0),
            (_EQUAL, 0, 1, process),
            _answer(_ALLOW),
        ],
        "fcntl": _fcntl(own_files),
    }
    for name in _OF_ITSELF:
        rules[name] = [_argument(0), (_EQUAL, 1, 0, 0), (_EQUAL, 0, 1, process), _answer(_ALLOW)]
    for name in _DONE_ALREADY:
        # The scratch folder is in memory; on a file of the system it would only keep the disk busy.
        rules[name] = [_answer(_REFUSE)]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        _answer(_KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        _refused(),
    ]
    for name, number in sorted(calls.items(), key=lambda call: call[1]):
        lines = [*rules[name], _refused()] if name in rules else [_answer(_ALLOW)]
        program += [(_EQUAL, 0, len(lines), number), *lines]
    program.append(_refused())
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def _fcntl(own_files: bool) -> list[Line]:
    commands = (*_COPY_AND_FLAGS, *_PIPE_SIZE, *(_LOCKS if own_files else ()))
    lines: list[Line] = [_argument(1)]
    for command in commands:
        lines += [(_EQUAL, 0, 1, command), _answer(_ALLOW)]
    # Status flags may be set, but not the one that sends a signal for every byte.
    return [
        *lines,
        (_EQUAL, 0, 3, _SET_STATUS),
        _argument(2),
        (_ANY_BIT, 1, 0, _ASYNCHRONOUS),
        _answer(_ALLOW),
    ]


def _argument(index: int, upper: bool = False) -> Line:
    """Load half of an argument of the call; both processors store the lower half first."""
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * upper)


def _answer(verdict: int) -> Line:
    return (_RETURN, 0, 0, verdict)


def _refused() -> Line:
    return _answer(_REFUSE | errno.EPERM)
