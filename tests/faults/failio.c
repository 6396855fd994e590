/* Makes the k-th file operation of a process fail: cc -shared -fPIC -O1 -o failio.so failio.c -ldl, then LD_PRELOAD.
 *
 * Counted are write, pwrite, fsync, rename, mkdir, ftruncate, posix_fallocate and creating open calls below one directory,
 * from failio_arm() on. The k-th one (and, when `sticky`, every later one, as on a disk that stays full) fails with `error`;
 * with error 0 a write is cut to half its length instead. Nothing is counted before arming, so that imports and the test harness are not disturbed. Single-threaded.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static long target, seen;
static int error_number, sticky, armed;

void failio_arm(const char *directory, long k, int error, int stay) {
    snprintf(prefix, sizeof prefix, "%s", directory);
    target = k;
    error_number = error;
    sticky = stay;
    seen = 0;
    armed = 1;
}

long failio_seen(void) { return seen; }

static int below(const char *path) { return armed && path && strncmp(path, prefix, strlen(prefix)) == 0; }

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Counts one operation; true if it is one that must fail. */
static int hit(void) {
    ++seen;
    return seen == target || (sticky && target > 0 && seen > target);
}

static int fails(void) {
    if (!hit() || error_number == 0) return 0;
    errno = error_number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t count) {
    if (below_fd(fd) && hit()) {
        if (error_number != 0) {
            errno = error_number;
            return -1;
        }
        if (count > 1) count /= 2;
    }
    return REAL(write)(fd, data, count);
}

#define PWRITE(name, type)                                              \
    ssize_t name(int fd, const void *data, size_t count, type offset) { \
        if (below_fd(fd) && hit()) {                                    \
            if (error_number != 0) {                                    \
                errno = error_number;                                   \
                return -1;                                              \
            }                                                           \
            if (count > 1) count /= 2;                                  \
        }                                                               \
        return REAL(name)(fd, data, count, offset);                     \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

/* Returns the error instead of setting errno. */
#define FALLOCATE(name, type)                                                \
    int name(int fd, type offset, type size) {                               \
        if (below_fd(fd) && hit() && error_number != 0) return error_number; \
        return REAL(name)(fd, offset, size);                                 \
    }
FALLOCATE(posix_fallocate, off_t)
FALLOCATE(posix_fallocate64, off64_t)

int fsync(int fd) { return below_fd(fd) && fails() ? -1 : REAL(fsync)(fd); }
int ftruncate(int fd, off_t size) { return below_fd(fd) && fails() ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return below_fd(fd) && fails() ? -1 : REAL(ftruncate64)(fd, size); }
int rename(const char *from, const char *to) { return below(to) && fails() ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return below(path) && fails() ? -1 : REAL(mkdir)(path, mode); }

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;               \
        va_end(rest);                                                           \
        if (flags & O_CREAT && below(path) && fails()) return -1;               \
        return REAL(name)(path, flags, mode);                                   \
    }
OPEN(open)
OPEN(open64)
