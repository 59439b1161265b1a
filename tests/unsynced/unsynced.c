/* LD_PRELOAD library: keeps, for every file under $UNSYNCED_DIR, an undo log of what was written since its last fsync.
 *
 * After kill -9 the page cache still holds unsynced writes; playing the logs backwards (tests/crash.py) makes the files
 * what a power cut could have left. One log per inode in $UNSYNCED_LOG; a record is {offset, old size, n, n old bytes}.
 * Not covered: writes through mmap (SQLite's -shm, which is deleted instead), directory entries, stdio inside libc.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CACHED(name) static __typeof__(&name) real; if (!real) real = REAL(name)

static char watched[PATH_MAX], logs[PATH_MAX];

__attribute__((constructor)) static void begin(void) {
    const char *dir = getenv("UNSYNCED_DIR"), *log = getenv("UNSYNCED_LOG");
    if (!dir || !log || !realpath(dir, watched) || !realpath(log, logs)) watched[0] = 0;
}

static int is_watched_path(const char *path) {
    size_t n = strlen(watched);
    return n && strncmp(path, watched, n) == 0 && (path[n] == '/' || path[n] == 0);
}

/* Fills `about` and says whether fd is a regular file under the watched directory. */
static int is_watched(int fd, struct stat *about) {
    char link[64], path[PATH_MAX];
    if (!watched[0] || fstat(fd, about) || !S_ISREG(about->st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_watched_path(path);
}

static void log_name(const struct stat *about, char *name, size_t size) {
    snprintf(name, size, "%s/%llu-%llu", logs, (unsigned long long)about->st_dev, (unsigned long long)about->st_ino);
}

/* Opens the inode's log and locks it: one writer or syncer of a file at a time, over threads and processes. */
static int lock_log(const struct stat *about) {
    char name[PATH_MAX + 64];
    log_name(about, name, sizeof name);
    int log = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log >= 0) flock(log, LOCK_EX);
    return log;
}

static void unlock_log(int log) {
    if (log >= 0) syscall(SYS_close, log);
}

/* The descriptor itself wherever it can be read: closing a second one drops the process's fcntl locks on the file, and
 * SQLite in another process then takes it for dead. */
static int readable(int fd) {
    if ((fcntl(fd, F_GETFL) & O_ACCMODE) != O_WRONLY) return fd;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return (int)syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
}

/* Appends what [offset, offset + count) holds now, and the size now. */
static void note(int log, int fd, uint64_t offset, uint64_t count) {
    struct stat about;
    if (log < 0 || fstat(fd, &about)) return;
    uint64_t size = (uint64_t)about.st_size, n = offset >= size ? 0 : size - offset;
    if (n > count) n = count;
    uint64_t head[3] = {offset, size, n};
    char *record = malloc(sizeof head + n);
    if (!record) abort();
    memcpy(record, head, sizeof head);
    int twin = readable(fd);
    for (uint64_t got = 0; got < n;) {
        ssize_t r = syscall(SYS_pread64, twin, record + sizeof head + got, n - got, offset + got);
        if (r <= 0) abort();
        got += (uint64_t)r;
    }
    if (twin >= 0 && twin != fd) syscall(SYS_close, twin);
    if (syscall(SYS_write, log, record, sizeof head + n) != (ssize_t)(sizeof head + n)) abort();
    free(record);
}

static uint64_t position(int fd, const struct stat *about) {
    return fcntl(fd, F_GETFL) & O_APPEND ? (uint64_t)about->st_size : (uint64_t)lseek(fd, 0, SEEK_CUR);
}

static uint64_t total(const struct iovec *parts, int count) {
    uint64_t n = 0;
    for (int i = 0; i < count; i++) n += parts[i].iov_len;
    return n;
}

/* Runs `call` with the change logged before it. `where` is evaluated under the lock. */
#define LOGGED(type, fd, where, count, call)                    \
    do {                                                        \
        struct stat about;                                      \
        if (!is_watched(fd, &about)) return call;               \
        int log = lock_log(&about);                             \
        fstat(fd, &about);                                      \
        note(log, fd, where, count);                            \
        type result = call;                                     \
        int saved = errno;                                      \
        unlock_log(log);                                        \
        errno = saved;                                          \
        return result;                                          \
    } while (0)

ssize_t write(int fd, const void *data, size_t n) {
    CACHED(write);
    LOGGED(ssize_t, fd, position(fd, &about), n, real(fd, data, n));
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    CACHED(pwrite);
    LOGGED(ssize_t, fd, (uint64_t)at, n, real(fd, data, n, at));
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    CACHED(pwrite64);
    LOGGED(ssize_t, fd, (uint64_t)at, n, real(fd, data, n, at));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    CACHED(writev);
    LOGGED(ssize_t, fd, position(fd, &about), total(parts, count), real(fd, parts, count));
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    CACHED(pwritev);
    LOGGED(ssize_t, fd, (uint64_t)at, total(parts, count), real(fd, parts, count, at));
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    CACHED(pwritev64);
    LOGGED(ssize_t, fd, (uint64_t)at, total(parts, count), real(fd, parts, count, at));
}
ssize_t sendfile(int out, int in, off_t *from, size_t n) { /* shutil.copyfile */
    CACHED(sendfile);
    LOGGED(ssize_t, out, position(out, &about), n, real(out, in, from, n));
}
ssize_t sendfile64(int out, int in, off64_t *from, size_t n) {
    CACHED(sendfile64);
    LOGGED(ssize_t, out, position(out, &about), n, real(out, in, from, n));
}
int ftruncate(int fd, off_t size) {
    CACHED(ftruncate);
    LOGGED(int, fd, (uint64_t)size, UINT64_MAX, real(fd, size));
}
int ftruncate64(int fd, off64_t size) {
    CACHED(ftruncate64);
    LOGGED(int, fd, (uint64_t)size, UINT64_MAX, real(fd, size));
}
int posix_fallocate(int fd, off_t at, off_t n) {
    CACHED(posix_fallocate);
    LOGGED(int, fd, (uint64_t)at, 0, real(fd, at, n));
}
int posix_fallocate64(int fd, off64_t at, off64_t n) {
    CACHED(posix_fallocate64);
    LOGGED(int, fd, (uint64_t)at, 0, real(fd, at, n));
}

/* What a sync finds written is safe from then on: forget how to undo it. */
#define SYNCED(fd, call)                                        \
    do {                                                        \
        struct stat about;                                      \
        if (!is_watched(fd, &about)) return call;               \
        int log = lock_log(&about);                             \
        int result = call, saved = errno;                       \
        if (result == 0 && log >= 0) syscall(SYS_ftruncate, log, 0); \
        unlock_log(log);                                        \
        errno = saved;                                          \
        return result;                                          \
    } while (0)

int fsync(int fd) {
    CACHED(fsync);
    SYNCED(fd, real(fd));
}
int fdatasync(int fd) {
    CACHED(fdatasync);
    SYNCED(fd, real(fd));
}

/* The inode's number may be given to another file: its log goes with its last name. */
static void forget(int dir, const char *path) {
    struct stat about;
    char name[PATH_MAX + 64];
    if (!watched[0] || fstatat(dir, path, &about, AT_SYMLINK_NOFOLLOW) || !S_ISREG(about.st_mode)) return;
    if (about.st_nlink > 1) return;
    log_name(&about, name, sizeof name);
    syscall(SYS_unlinkat, AT_FDCWD, name, 0);
}
int unlink(const char *path) {
    CACHED(unlink);
    forget(AT_FDCWD, path);
    return real(path);
}
int unlinkat(int dir, const char *path, int flags) {
    CACHED(unlinkat);
    if (!(flags & AT_REMOVEDIR)) forget(dir, path);
    return real(dir, path, flags);
}
int rename(const char *from, const char *to) {
    CACHED(rename);
    forget(AT_FDCWD, to);
    return real(from, to);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    CACHED(renameat);
    forget(to_dir, to);
    return real(from_dir, from, to_dir, to);
}

/* O_TRUNC throws the content away without ftruncate. */
static void note_truncation(int dir, const char *path, int flags) {
    if (!watched[0] || !(flags & O_TRUNC)) return;
    int fd = (int)syscall(SYS_openat, dir, path, O_RDONLY | O_CLOEXEC, 0);
    struct stat about;
    if (fd < 0) return;
    if (is_watched(fd, &about) && about.st_size > 0) {
        int log = lock_log(&about);
        note(log, fd, 0, UINT64_MAX);
        unlock_log(log);
    }
    syscall(SYS_close, fd);
}

#define MODE(flags, mode)                                       \
    mode_t mode = 0;                                            \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                      \
        va_list rest;                                           \
        va_start(rest, flags);                                  \
        mode = va_arg(rest, mode_t);                            \
        va_end(rest);                                           \
    }

int open(const char *path, int flags, ...) {
    MODE(flags, mode);
    CACHED(open);
    note_truncation(AT_FDCWD, path, flags);
    return real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags, mode);
    CACHED(open64);
    note_truncation(AT_FDCWD, path, flags);
    return real(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
    MODE(flags, mode);
    CACHED(openat);
    note_truncation(dir, path, flags);
    return real(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
    MODE(flags, mode);
    CACHED(openat64);
    note_truncation(dir, path, flags);
    return real(dir, path, flags, mode);
}
