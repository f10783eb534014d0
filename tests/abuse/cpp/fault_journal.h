// Everything that changes below the directory, in order, for the replay of a power cut (tests/abuse/power_cut.py).
//
// A record is a line of tab-separated fields and, of W, so many bytes after it:
//   W inode offset size | T inode size | S inode | C parent name inode | R parent name parent name | U parent name
//   M parent name inode | D parent name | L inode parent name | X what (something that is not modelled)
#pragma once

#include <sys/stat.h>

#include "fault_plan.h"

struct Journal {
    std::recursive_mutex lock;  // held over a call and its record, so that records are in the order of the calls
    int file = -1;
};

inline Journal& journal() {
    static Journal* one = new Journal;
    return *one;
}

inline bool journaled(const std::string& path) { return journal().file >= 0 && below(path); }

inline unsigned long inode(const std::string& path) {
    struct stat found;
    return lstat(path.c_str(), &found) == 0 ? found.st_ino : 0;
}

inline unsigned long inode(int file) {
    struct stat found;
    return fstat(file, &found) == 0 ? found.st_ino : 0;
}

// "inode of the parent, tab, name": an entry of a directory.
inline std::string entry(const std::string& path) {
    size_t cut = path.rfind('/');
    return std::to_string(inode(cut ? path.substr(0, cut) : "/")) + "\t" + path.substr(cut + 1);
}

inline void note(const std::string& line) { put(journal().file, (line + "\n").data(), line.size() + 1); }

inline void note_write(int file, long offset, const void* data, long size) {
    if (size <= 0) return;
    note("W\t" + std::to_string(inode(file)) + "\t" + std::to_string(offset) + "\t" + std::to_string(size));
    put(journal().file, data, size);
}

// What sendfile or copy_file_range has put into a file, read back.
inline void note_copied(int file, long offset, long size) {
    std::vector<char> data(size > 0 ? size : 0);
    long got = 0;
    int again = syscall(SYS_openat, AT_FDCWD, ("/proc/self/fd/" + std::to_string(file)).c_str(), O_RDONLY);
    while (got < size) {
        long more = syscall(SYS_pread64, again, data.data() + got, size - got, offset + got);
        if (more <= 0) break;
        got += more;
    }
    close(again);
    note_write(file, offset, data.data(), got);
}

inline long position(int file) {
    long at = lseek(file, 0, fcntl(file, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
    return at;
}
