// A disk that fails on command: loaded with LD_PRELOAD, it stands between a program and libc for the files below one
// directory, makes calls fail as a plan says (fault_plan.h), and can write down every change (fault_journal.h).
//
// FAULT_DIRECTORY, FAULT_PLAN, FAULT_LOG and FAULT_JOURNAL say what at the start; a process that was forked calls
// fault_configure instead. Kinds: eio, enospc, eintr, eagain fail the call; short does less than was asked for; delay
// waits 5 s; truncate cuts the file to a third first; kill ends the process before the call, killafter after it, torn
// after half of it; lie says that it synced and did not; see does nothing but log. A mapping that fails with eio gives
// SIGBUS where it is read, as a disk's does.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

#include "fault_journal.h"

#define REAL(name) ((decltype(&name))real(#name))
typedef std::lock_guard<std::recursive_mutex> Held;

static void* real(const char* name) { return dlsym(RTLD_NEXT, name); }

static const long DELAY_US = 5000000;
static const size_t SECTOR = 512;

// What comes before a call; whether it shall not be made, with errno set.
static bool refused(const std::string& kind, const std::string& path) {
    if (kind == "delay") usleep(DELAY_US);
    if (kind == "kill") die();
    if (kind == "truncate") {
        struct stat found;
        if (stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode)) syscall(SYS_truncate, path.c_str(), found.st_size / 3);
    }
    if (!error_of(kind)) return false;
    errno = error_of(kind);
    return true;
}

static size_t cut(const std::string& kind, size_t size, int file) {
    if (kind != "short" && kind != "torn") return size;
    size_t unit = fcntl(file, F_GETFL) & O_DIRECT ? SECTOR : 1;
    size_t part = size / 3 / unit * unit;
    return part ? part : (size < unit ? size : unit);
}

static long after(const std::string& kind, long result) {
    if (kind == "killafter" || kind == "torn") die();
    return result;
}

// ---- reads

template <class Call>
static long reading(Op op, int file, size_t size, Call call) {
    std::string path = plan().directory.empty() ? "" : path_of(file), kind = fault(op, path);
    if (refused(kind, path)) return -1;
    return after(kind, call(cut(kind, size, file)));
}

static size_t total(const struct iovec* parts, int count) {
    size_t sum = 0;
    for (int i = 0; i < count; i++) sum += parts[i].iov_len;
    return sum;
}

// The first `size` bytes of buffers.
static std::vector<struct iovec> first(const struct iovec* parts, int count, size_t size) {
    std::vector<struct iovec> out;
    for (int i = 0; i < count && size > 0; i++) {
        struct iovec part = parts[i];
        part.iov_len = part.iov_len < size ? part.iov_len : size;
        size -= part.iov_len;
        out.push_back(part);
    }
    return out;
}

extern "C" ssize_t read(int f, void* to, size_t n) {
    return reading(READ, f, n, [&](size_t m) { return REAL(read)(f, to, m); });
}
extern "C" ssize_t pread(int f, void* to, size_t n, off_t at) {
    return reading(READ, f, n, [&](size_t m) { return REAL(pread)(f, to, m, at); });
}
extern "C" ssize_t pread64(int f, void* to, size_t n, off64_t at) { return pread(f, to, n, at); }
extern "C" ssize_t readv(int f, const struct iovec* v, int n) {
    return reading(VREAD, f, total(v, n), [&](size_t m) {
        auto parts = first(v, n, m);
        return REAL(readv)(f, parts.data(), parts.size());
    });
}
extern "C" ssize_t preadv(int f, const struct iovec* v, int n, off_t at) {
    return reading(VREAD, f, total(v, n), [&](size_t m) {
        auto parts = first(v, n, m);
        return REAL(preadv)(f, parts.data(), parts.size(), at);
    });
}
extern "C" ssize_t preadv64(int f, const struct iovec* v, int n, off64_t at) { return preadv(f, v, n, at); }
extern "C" ssize_t preadv2(int f, const struct iovec* v, int n, off_t at, int flags) {
    return reading(VREAD, f, total(v, n), [&](size_t m) {
        auto parts = first(v, n, m);
        return REAL(preadv2)(f, parts.data(), parts.size(), at, flags);
    });
}
extern "C" ssize_t preadv64v2(int f, const struct iovec* v, int n, off64_t at, int flags) {
    return preadv2(f, v, n, at, flags);
}

extern "C" void* mmap(void* where, size_t size, int access, int flags, int file, off_t at) {
    if (file < 0 || plan().directory.empty()) return REAL(mmap)(where, size, access, flags, file, at);
    std::string path = path_of(file), kind = fault(MAP, path);
    if (kind == "eio") {  // nothing behind the mapping
        int empty = memfd_create("empty", 0);
        void* found = REAL(mmap)(where, size, access, flags, empty, 0);
        close(empty);
        return found;
    }
    if (refused(kind, path)) return MAP_FAILED;
    if ((flags & MAP_SHARED) && (access & PROT_WRITE) && journaled(path)) note("X\tshared mapping of " + path);
    return REAL(mmap)(where, size, access, flags, file, at);
}
extern "C" void* mmap64(void* where, size_t size, int access, int flags, int file, off64_t at) {
    return mmap(where, size, access, flags, file, at);
}

// ---- buffered files: libc's own calls cannot be seen from here, so they go through ours

static ssize_t cookie_read(void* file, char* to, size_t n) { return read(int(intptr_t(file)), to, n); }
static ssize_t cookie_write(void* file, const char* from, size_t n) {
    ssize_t done = write(int(intptr_t(file)), from, n);
    return done < 0 ? 0 : done;
}
static int cookie_seek(void* file, off64_t* at, int from) {
    *at = lseek(int(intptr_t(file)), *at, from);
    return *at < 0 ? -1 : 0;
}
static int cookie_close(void* file) { return close(int(intptr_t(file))); }

extern "C" FILE* fdopen(int file, const char* mode) {
    if (!below(path_of(file))) return REAL(fdopen)(file, mode);
    return fopencookie((void*)intptr_t(file), mode, {cookie_read, cookie_write, cookie_seek, cookie_close});
}

// ---- writes

template <class Call>
static long writing(int file, size_t size, long at, Call call) {
    std::string path = plan().directory.empty() ? "" : path_of(file), kind = fault(WRITE, path);
    if (refused(kind, path)) return -1;
    size = cut(kind, size, file);
    if (!journaled(path)) return after(kind, call(size));
    Held held(journal().lock);
    long start = at < 0 ? position(file) : at, done = call(size);
    if (done > 0) note_copied(file, start, done);
    return after(kind, done);
}

extern "C" ssize_t write(int f, const void* from, size_t n) {
    return writing(f, n, -1, [&](size_t m) { return REAL(write)(f, from, m); });
}
extern "C" ssize_t pwrite(int f, const void* from, size_t n, off_t at) {
    return writing(f, n, at, [&](size_t m) { return REAL(pwrite)(f, from, m, at); });
}
extern "C" ssize_t pwrite64(int f, const void* from, size_t n, off64_t at) { return pwrite(f, from, n, at); }
extern "C" ssize_t writev(int f, const struct iovec* v, int n) {
    return writing(f, total(v, n), -1, [&](size_t m) {
        auto parts = first(v, n, m);
        return REAL(writev)(f, parts.data(), parts.size());
    });
}
extern "C" ssize_t pwritev(int f, const struct iovec* v, int n, off_t at) {
    return writing(f, total(v, n), at, [&](size_t m) {
        auto parts = first(v, n, m);
        return REAL(pwritev)(f, parts.data(), parts.size(), at);
    });
}
extern "C" ssize_t pwritev64(int f, const struct iovec* v, int n, off64_t at) { return pwritev(f, v, n, at); }

extern "C" ssize_t sendfile(int to, int from, off_t* at, size_t n) {
    return reading(READ, from, n, [&](size_t m) {
        return writing(to, m, -1, [&](size_t less) { return REAL(sendfile)(to, from, at, less); });
    });
}
extern "C" ssize_t sendfile64(int to, int from, off64_t* at, size_t n) { return sendfile(to, from, (off_t*)at, n); }
extern "C" ssize_t copy_file_range(int from, off64_t* start, int to, off64_t* at, size_t n, unsigned flags) {
    return reading(READ, from, n, [&](size_t m) {
        return writing(to, m, at ? *at : -1, [&](size_t less) {
            return REAL(copy_file_range)(from, start, to, at, less, flags);
        });
    });
}

template <class Call>
static int sizing(const std::string& path, unsigned long node, long size, Call call) {
    std::string kind = fault(SIZE, path);
    if (refused(kind, path)) return -1;
    Held held(journal().lock);
    int result = call();
    if (result == 0 && journaled(path)) note("T\t" + std::to_string(node) + "\t" + std::to_string(size));
    return after(kind, result);
}

extern "C" int ftruncate(int f, off_t size) {
    return sizing(path_of(f), inode(f), size, [&] { return REAL(ftruncate)(f, size); });
}
extern "C" int ftruncate64(int f, off64_t size) { return ftruncate(f, size); }
extern "C" int truncate(const char* name, off_t size) {
    std::string path = absolute(AT_FDCWD, name);
    return sizing(path, inode(path), size, [&] { return REAL(truncate)(name, size); });
}
extern "C" int truncate64(const char* name, off64_t size) { return truncate(name, size); }
extern "C" int posix_fallocate(int f, off_t at, off_t size) {  // gives the error, not -1
    std::string path = path_of(f), kind = fault(SIZE, path);
    if (refused(kind, path)) return errno;
    if (journaled(path)) note("X\tfallocate of " + path);
    return REAL(posix_fallocate)(f, at, size);
}
extern "C" int posix_fallocate64(int f, off64_t at, off64_t size) { return posix_fallocate(f, at, size); }

template <class Call>
static int syncing(int file, Call call) {
    std::string path = path_of(file), kind = fault(SYNC, path);
    if (refused(kind, path)) return -1;
    if (kind == "lie") return 0;
    Held held(journal().lock);
    int result = call();
    if (result == 0 && journaled(path)) note("S\t" + std::to_string(inode(file)));
    return after(kind, result);
}

extern "C" int fsync(int f) {
    return syncing(f, [&] { return REAL(fsync)(f); });
}
extern "C" int fdatasync(int f) {
    return syncing(f, [&] { return REAL(fdatasync)(f); });
}

// ---- names

template <class Call>
static int opening(int directory, const char* name, int flags, Call call) {
    std::string path = absolute(directory, name);
    if (!below(path)) return call();
    std::string kind = fault(OPEN, path);
    if (refused(kind, path)) return -1;
    Held held(journal().lock);
    struct stat before;
    bool there = stat(path.c_str(), &before) == 0;
    int file = call();
    if (file >= 0 && journaled(path) && (flags & O_CREAT) && !there)
        note("C\t" + entry(path) + "\t" + std::to_string(inode(file)));
    else if (file >= 0 && journaled(path) && (flags & O_TRUNC) && before.st_size > 0)
        note("T\t" + std::to_string(inode(file)) + "\t0");
    return after(kind, file);
}

#define MODE(flags, last)                                 \
    mode_t mode = 0;                                      \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list more;                                     \
        va_start(more, last);                             \
        mode = va_arg(more, int);                         \
        va_end(more);                                     \
    }

extern "C" int open(const char* name, int flags, ...) {
    MODE(flags, flags)
    return opening(AT_FDCWD, name, flags, [&] { return REAL(open)(name, flags, mode); });
}
extern "C" int open64(const char* name, int flags, ...) {
    MODE(flags, flags)
    return opening(AT_FDCWD, name, flags, [&] { return REAL(open64)(name, flags, mode); });
}
extern "C" int openat(int d, const char* name, int flags, ...) {
    MODE(flags, flags)
    return opening(d, name, flags, [&] { return REAL(openat)(d, name, flags, mode); });
}
extern "C" int openat64(int d, const char* name, int flags, ...) {
    MODE(flags, flags)
    return opening(d, name, flags, [&] { return REAL(openat64)(d, name, flags, mode); });
}

// One change of names; `line` is its record.
template <class Line, class Call>
static int naming(const std::string& path, Line line, Call call) {
    if (!below(path)) return call();
    std::string kind = fault(NAME, path);
    if (refused(kind, path)) return -1;
    Held held(journal().lock);
    std::string text = journaled(path) ? line() : "";
    int result = call();
    if (result == 0 && !text.empty()) note(text);
    return after(kind, result);
}

extern "C" int renameat(int d, const char* a, int e, const char* b) {
    std::string from = absolute(d, a), to = absolute(e, b);
    return naming(below(from) ? from : to, [&] { return "R\t" + entry(from) + "\t" + entry(to); },
                  [&] { return REAL(renameat)(d, a, e, b); });
}
extern "C" int rename(const char* a, const char* b) { return renameat(AT_FDCWD, a, AT_FDCWD, b); }
extern "C" int unlinkat(int d, const char* name, int flags) {
    std::string path = absolute(d, name);
    return naming(path, [&] { return (flags & AT_REMOVEDIR ? "D\t" : "U\t") + entry(path); },
                  [&] { return REAL(unlinkat)(d, name, flags); });
}
extern "C" int unlink(const char* name) { return unlinkat(AT_FDCWD, name, 0); }
extern "C" int rmdir(const char* name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
extern "C" int linkat(int d, const char* a, int e, const char* b, int flags) {
    std::string from = absolute(d, a), to = absolute(e, b);
    return naming(to, [&] { return "L\t" + std::to_string(inode(from)) + "\t" + entry(to); },
                  [&] { return REAL(linkat)(d, a, e, b, flags); });
}
extern "C" int link(const char* a, const char* b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }
extern "C" int mkdirat(int d, const char* name, mode_t mode) {
    std::string path = absolute(d, name);
    auto make = [&] {
        int result = REAL(mkdirat)(d, name, mode);
        if (result == 0 && journaled(path)) note("M\t" + entry(path) + "\t" + std::to_string(inode(path)));
        return result;
    };
    return naming(path, [] { return ""; }, make);
}
extern "C" int mkdir(const char* name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
extern "C" int symlink(const char* a, const char* b) {
    if (journaled(absolute(AT_FDCWD, b))) note(std::string("X\tsymlink ") + b);
    return REAL(symlink)(a, b);
}

// ---- what is asked for

extern "C" void fault_configure(const char* directory, const char* rules, const char* log, const char* notes) {
    std::lock_guard<std::mutex> held(plan().lock);
    plan().directory = directory ? directory : "";
    plan().rules.clear();
    std::istringstream all(rules ? rules : "");
    for (std::string one; std::getline(all, one, ';');)
        if (!one.empty()) plan().rules.push_back(parse_rule(one));
    memset(plan().calls, 0, sizeof plan().calls);
    const int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
    plan().log = log && *log ? syscall(SYS_openat, AT_FDCWD, log, flags, 0644) : -1;
    journal().file = notes && *notes ? syscall(SYS_openat, AT_FDCWD, notes, flags, 0644) : -1;
}

__attribute__((constructor)) static void begin() {
    fault_configure(getenv("FAULT_DIRECTORY"), getenv("FAULT_PLAN"), getenv("FAULT_LOG"), getenv("FAULT_JOURNAL"));
}

extern "C" __attribute__((destructor)) void fault_counts() {
    std::ostringstream line;
    line << "calls";
    for (int i = 0; i < OPS; i++) line << " " << OP_NAMES[i] << "=" << plan().calls[i];
    if (!plan().directory.empty()) say(line.str());
}
