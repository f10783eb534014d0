// Which call fails, and how: rules, their counters, and the log of what was really injected.
//
// A plan is rules with ';' between, each "kind op first count part" with a space between (count -1: for ever), or
// "kind op p=PROBABILITY seed part". `first` counts the calls of that operation on files whose path holds `part`, from 0
// ("*": any file; "part$": whose path ends so). Only calls below the given directory are counted. The log has a line
// per injected fault and, at the end of the process, one with the number of calls of each operation.
#pragma once

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>
#include <sstream>
#include <string>
#include <vector>

enum Op { READ, VREAD, WRITE, SYNC, NAME, OPEN, MAP, SIZE, OPS };
const char* const OP_NAMES[OPS] = {"read", "vread", "write", "sync", "name", "open", "map", "size"};

struct Rule {
    std::string kind, part;
    Op op;
    long first, count, seen;
    double probability;
    uint64_t state;
};

struct Plan {
    std::mutex lock;
    std::string directory;  // canonical; empty: nothing is touched
    std::vector<Rule> rules;
    long calls[OPS];
    int log = -1;
};

inline Plan& plan() {
    static Plan* one = new Plan;  // never destroyed: threads may read until the very end
    return *one;
}

inline void put(int file, const void* data, size_t size) {  // past our own hooks
    for (const char* at = (const char*)data; size > 0;) {
        long done = syscall(SYS_write, file, at, size);
        if (done <= 0) return;
        at += done;
        size -= done;
    }
}

inline void say(const std::string& line) {
    if (plan().log >= 0) put(plan().log, (line + "\n").data(), line.size() + 1);
}

inline bool below(const std::string& path) {
    const std::string& top = plan().directory;
    return !top.empty() && path.compare(0, top.size(), top) == 0 && (path.size() == top.size() || path[top.size()] == '/');
}

inline std::string path_of(int file) {
    char link[64], found[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, found, sizeof found);
    return size > 0 ? std::string(found, size) : std::string();
}

// The path that a name in a directory stands for, its last part not followed.
inline std::string absolute(int directory, const char* name) {
    if (!name || plan().directory.empty()) return "";
    std::string full = name;
    if (full.empty() || full[0] != '/') {
        char here[PATH_MAX];
        std::string base = directory == AT_FDCWD ? (getcwd(here, sizeof here) ? here : "") : path_of(directory);
        full = base + "/" + full;
    }
    while (full.size() > 1 && full.back() == '/') full.pop_back();
    size_t cut = full.rfind('/');
    char real[PATH_MAX];
    if (!realpath(cut ? full.substr(0, cut).c_str() : "/", real)) return full;
    return std::string(real) + full.substr(cut);
}

inline double next_uniform(uint64_t& state) {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return double((z ^ (z >> 31)) >> 11) / double(1ull << 53);
}

inline bool holds(const std::string& path, const std::string& part) {
    if (part == "*") return true;
    if (part.back() != '$') return path.find(part) != std::string::npos;
    size_t size = part.size() - 1;
    return path.size() >= size && path.compare(path.size() - size, size, part, 0, size) == 0;
}

// What shall happen to this call: a kind of the plan, or "" for nothing.
inline std::string fault(Op op, const std::string& path) {
    if (!below(path)) return "";
    std::lock_guard<std::mutex> held(plan().lock);
    long number = plan().calls[op]++;
    for (Rule& rule : plan().rules) {
        if (rule.op != op || !holds(path, rule.part)) continue;
        long at = rule.seen++;
        bool hit = rule.probability > 0 ? next_uniform(rule.state) < rule.probability
                                        : at >= rule.first && (rule.count < 0 || at < rule.first + rule.count);
        if (!hit) continue;
        std::ostringstream line;
        line << rule.kind << " " << OP_NAMES[op] << " " << number << " " << path;
        say(line.str());
        return rule.kind;
    }
    return "";
}

inline int error_of(const std::string& kind) {
    if (kind == "eio") return EIO;
    if (kind == "enospc") return ENOSPC;
    if (kind == "eintr") return EINTR;
    if (kind == "eagain") return EAGAIN;
    return 0;
}

inline void die() { syscall(SYS_kill, getpid(), SIGKILL); }

inline Rule parse_rule(const std::string& text) {
    std::istringstream words(text);
    std::string op, first, count;
    Rule rule{};
    words >> rule.kind >> op >> first >> count >> rule.part;
    for (int i = 0; i < OPS; i++)
        if (op == OP_NAMES[i]) rule.op = Op(i);
    if (first.compare(0, 2, "p=") == 0) {
        rule.probability = strtod(first.c_str() + 2, nullptr);
        rule.state = strtoull(count.c_str(), nullptr, 10);
    } else {
        rule.first = atol(first.c_str());
        rule.count = atol(count.c_str());
    }
    if (rule.part.empty()) rule.part = "*";
    return rule;
}
