// Where buffers and threadgroup arrays lie, and whether an access is inside one of them.
// A copied buffer sits in its own 16 GiB of address space and ends at an unmapped page: 32-bit index errors cannot
// reach the next.
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

static const size_t kPage = 4096, kAlign = 256;

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

template <class T>
static T* map_shadow(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(T) + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (T*)p;
}

static bool reserve_slots(int count) {
  for (machine.slot_shift = 34; machine.slot_shift >= 28; machine.slot_shift -= 2) {
    machine.reserve_bytes = (size_t)(count + 1) << machine.slot_shift;
    machine.reserve =
        (char*)mmap(nullptr, machine.reserve_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (machine.reserve != MAP_FAILED) return true;
  }
  machine.reserve = nullptr;
  return false;
}

// The copy of a buffer in the middle of its slot; what is left of its pages is poison.
static char* place_copy(int slot, const BufferArgument& argument) {
  size_t slack = machine.options.check ? 64 : 0;  // a small overrun is reported there, and the lane goes on
  size_t padded = round_up(argument.bytes + argument.skew + slack, kAlign),
         pages = round_up(std::max(padded, kAlign), kPage);
  size_t slot_bytes = (size_t)1 << machine.slot_shift;
  if (pages + 2 * kPage > slot_bytes) return nullptr;
  char* first = machine.reserve + slot * slot_bytes + round_up((slot_bytes - pages) / 2, kPage);
  if (mprotect(first, pages, PROT_READ | PROT_WRITE)) return nullptr;
  memset(first, kPoison, pages);
  char* begin = first + pages - padded + argument.skew;
  if (!argument.writable || argument.initialised) memcpy(begin, argument.host, argument.bytes);
  return begin;
}

bool memory_map(const BufferArgument* arguments, int count, std::vector<void*>& pointers) {
  if (!reserve_slots(count)) return false;
  machine.buffers.clear();
  for (int i = 0; i < count; i++) {
    const BufferArgument& a = arguments[i];
    Buffer buffer;
    buffer.name = a.name;
    buffer.begin = a.in_place ? (char*)a.host : place_copy(i, a);
    buffer.bytes = a.bytes;
    buffer.writable = a.writable != 0;
    buffer.in_place = a.in_place != 0;
    buffer.element = a.element;
    if (!buffer.begin) return false;
    if (machine.options.check && a.writable) {
      buffer.history = map_shadow<Access>(a.bytes / a.element + 1);
      buffer.written = map_shadow<uint8_t>(a.bytes);
      if (!buffer.history || !buffer.written) return false;
      if (a.initialised) memset(buffer.written, 1, a.bytes);
    }
    machine.buffers.push_back(buffer);
    pointers.push_back(buffer.begin);
  }
  return true;
}

void memory_return(const BufferArgument* arguments, int count) {
  for (int i = 0; i < count; i++)
    if (arguments[i].writable && !arguments[i].in_place)
      memcpy(arguments[i].host, machine.buffers[i].begin, arguments[i].bytes);
}

void memory_unmap() {
  for (Buffer& buffer : machine.buffers) {
    if (buffer.history) munmap(buffer.history, (buffer.bytes / buffer.element + 1) * sizeof(Access) + 1);
    if (buffer.written) munmap(buffer.written, buffer.bytes + 1);
  }
  machine.buffers.clear();
  if (machine.reserve) munmap(machine.reserve, machine.reserve_bytes);
  machine.reserve = nullptr;
}

bool is_output_incomplete(const Buffer& buffer, size_t& missing) {
  missing = buffer.written ? std::count(buffer.written, buffer.written + buffer.bytes, 0) : 0;
  return missing != 0;
}

// ---- threadgroup arrays

void threadgroup_memory_reset() {
  if (!machine.arena) {
    machine.arena = (char*)mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    machine.arena_used = kArenaBytes;
  }
  if (machine.options.check && machine.arena_history.empty()) {
    machine.arena_history.assign(kArenaBytes, Access{});
    machine.arena_written.assign(kArenaBytes, 0);
  }
  memset(machine.arena, kPoison, machine.arena_used);
  machine.arrays.clear();
  machine.arena_used = kRedZone;
  machine.arena_payload = 0;
  machine.group_serial++;
  machine.first_epoch = ++machine.threadgroup_epoch;  // what earlier threadgroups did to the arena is forgotten
  machine.device_epoch++;
}

extern "C" void* mtl_threadgroup_array(const char* name, uint32_t id, uint64_t bytes) {
  for (const ThreadgroupArray& array : machine.arrays)
    if (array.id == id) return machine.arena + array.offset;
  size_t offset = round_up(machine.arena_used, 64);
  machine.arena_payload += round_up(bytes, 16);
  machine.counts.threadgroup_bytes = std::max<uint64_t>(machine.counts.threadgroup_bytes, machine.arena_payload);
  if (machine.arena_payload > kThreadgroupLimit)
    problem(CALLER, "TG-MEMORY", "%zu B of threadgroup memory with '%s', the limit is %zu", machine.arena_payload, name,
            kThreadgroupLimit);
  if (offset + bytes + kRedZone > kArenaBytes) lane_kill();
  machine.arrays.push_back({id, name, offset, bytes});
  machine.arena_used = offset + bytes + kRedZone;
  return machine.arena + offset;
}

// ---- accesses

static const char* verb(bool write) { return write ? "write" : "read"; }

static int find_buffer(uintptr_t address) {
  size_t inside = address - (uintptr_t)machine.reserve;
  if (machine.reserve && inside < machine.reserve_bytes) {
    size_t slot = inside >> machine.slot_shift;
    return slot < machine.buffers.size() && !machine.buffers[slot].in_place ? (int)slot : -1;
  }
  for (size_t i = 0; i < machine.buffers.size(); i++) {
    const Buffer& b = machine.buffers[i];
    if (b.in_place && address - (uintptr_t)b.begin + kPage < b.bytes + 2 * kPage) return (int)i;
  }
  return -1;
}

static void access_buffer(int index, uintptr_t address, size_t bytes, bool write, uintptr_t pc, bool atomic) {
  Buffer& b = machine.buffers[index];
  size_t offset = address - (uintptr_t)b.begin;
  if (offset >= b.bytes || bytes > b.bytes - offset) {
    problem(pc, "OOB", "%s of %zu B at byte offset %ld of buffer '%s' of %zu B", verb(write), bytes, (long)offset,
            b.name.c_str(), b.bytes);
    if ((long)offset < -(long)kPage || (long)(offset - b.bytes) >= (long)kAlign) lane_kill();  // unmapped, or nearly
    return;
  }
  if (write && !b.writable)
    problem(pc, "CONST-WRITE", "write to input '%s' at byte offset %zu", b.name.c_str(), offset);
  if (machine.options.profile) profile_access(address, bytes, write, index, pc);
  if (!b.history) return;
  for (size_t i = offset / b.element; !atomic && i <= (offset + bytes - 1) / b.element; i++)
    race_check(b.history[i], write, true, pc, b.name.c_str(), i * b.element);
  if (write) {
    memset(b.written + offset, 1, bytes);
  } else if (memchr(b.written + offset, 0, bytes)) {
    problem(pc, "UNINIT", "read of output '%s' at byte offset %zu, which nothing has written", b.name.c_str(), offset);
  }
}

static void access_arena(uintptr_t address, size_t bytes, bool write, uintptr_t pc, bool atomic) {
  size_t offset = address - (uintptr_t)machine.arena;
  const ThreadgroupArray* array = nullptr;
  for (const ThreadgroupArray& a : machine.arrays)
    if (offset + kRedZone / 2 >= a.offset) array = &a;
  if (!array || offset < array->offset || offset + bytes > array->offset + array->bytes) {
    problem(pc, "OOB", "%s of %zu B at byte offset %ld of threadgroup '%s' of %zu B", verb(write), bytes,
            array ? (long)offset - (long)array->offset : -1L, array ? array->name.c_str() : "?",
            array ? array->bytes : 0);
    return;
  }
  if (machine.options.profile) profile_access(address, bytes, write, -1, pc);
  if (!machine.options.check) return;
  const char* name = array->name.c_str();
  for (size_t i = offset; i < offset + bytes; i++) {
    if (!atomic) race_check(machine.arena_history[i], write, false, pc, name, i - array->offset);
    if (write) {
      machine.arena_written[i] = machine.group_serial;
    } else if (machine.arena_written[i] != machine.group_serial) {
      problem(pc, "UNINIT", "read of uninitialised threadgroup '%s' at byte offset %zu", name, i - array->offset);
      return;
    }
  }
}

void memory_access(uintptr_t address, size_t bytes, bool write, uintptr_t pc, bool atomic) {
  const Lane* lane = machine.current;
  if (!lane || !bytes) return;
  if (machine.timed_out) {
    problem(pc, "TIMEOUT", "still running after %.3g s of CPU time", machine.options.limit_s);
    lane_kill();
  }
  if (address - (uintptr_t)lane->stack < kStackBytes) return;
  machine.counts.accesses++;
  if (address - (uintptr_t)machine.arena < kArenaBytes) return access_arena(address, bytes, write, pc, atomic);
  int buffer = find_buffer(address);
  if (buffer >= 0) return access_buffer(buffer, address, bytes, write, pc, atomic);
  if (address >= machine.image_begin && address < machine.image_end && !write) return;  // tables in the program text
  if (address - (uintptr_t)machine.stacks < kStackBytes * kMaxThreads)
    problem(pc, "OOB", "%s of %zu B in another thread's private memory", verb(write), bytes);
  else
    problem(pc, "OOB", "%s of %zu B outside all buffers, at %p", verb(write), bytes, (void*)address);
  lane_kill();
}
