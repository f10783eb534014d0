// Two accesses to a byte, one of them a write, race unless one thread made both or a barrier for this memory lies
// between: a threadgroup_barrier within the threadgroup, a simdgroup_barrier within the simdgroup. Threadgroups are
// never ordered. Lockstep of a simdgroup is not assumed.
#include "runtime.h"

static const int32_t kReadByMany = -1;    // readers in several simdgroups
static const uint32_t kManyGroups = ~0u;  // readers in several threadgroups
// other negative readers: several lanes of simdgroup -reader - 2

namespace {
struct Here {
  int32_t thread;  // global, from 1
  int32_t simdgroup;
  uint32_t epoch, simd_epoch;
  bool device;
};
}  // namespace

static int32_t simdgroup_of(int32_t thread) { return (thread - 1) % kMaxThreads / 32; }
static uint32_t group_of(int32_t thread) { return (uint32_t)(thread - 1) / kMaxThreads; }

static bool is_ordered(const Here& here, int32_t thread, uint32_t epoch, uint32_t simd_epoch) {
  if (!thread || thread == here.thread) return true;
  if (here.device && group_of(thread) != machine.group_index) return false;
  return epoch < here.epoch || (simdgroup_of(thread) == here.simdgroup && simd_epoch < here.simd_epoch);
}

static bool reads_are_ordered(const Here& here, const Access& a) {
  if (!a.reader) return true;
  if (here.device && a.reader_group != machine.group_index + 1) return false;
  if (a.reader > 0) return is_ordered(here, a.reader, a.read_epoch, a.read_simd_epoch);
  if (a.read_epoch < here.epoch) return true;
  return -a.reader - 2 == here.simdgroup && a.read_simd_epoch < here.simd_epoch;
}

static void note_read(const Here& here, Access& a) {
  bool same_epoch = a.reader && a.read_epoch >= here.epoch;
  if (!same_epoch || a.reader == here.thread)
    a.reader = here.thread;
  else if (a.reader > 0)
    a.reader = simdgroup_of(a.reader) == here.simdgroup ? -2 - here.simdgroup : kReadByMany;
  else if (-a.reader - 2 != here.simdgroup)
    a.reader = kReadByMany;
  a.read_epoch = here.epoch;
  a.read_simd_epoch = here.simd_epoch;
  uint32_t group = machine.group_index + 1;
  a.reader_group = !a.reader_group || a.reader_group == group ? group : kManyGroups;
}

void race_check(Access& a, bool write, bool device, uintptr_t pc, const char* name, size_t offset) {
  const MtlThread& t = machine.current->thread;
  const Simdgroup& simdgroup = machine.simdgroups[t.simdgroup];
  Here here{(int32_t)(machine.group_index * kMaxThreads + t.index_in_group + 1), (int32_t)t.simdgroup,
            device ? machine.device_epoch : machine.threadgroup_epoch,
            device ? simdgroup.device_epoch : simdgroup.threadgroup_epoch, device};
  if (!device && a.write_epoch < machine.first_epoch) a.writer = 0;
  if (!device && a.read_epoch < machine.first_epoch) a.reader = 0;
  if (!is_ordered(here, a.writer, a.write_epoch, a.write_simd_epoch))
    problem(pc, "RACE",
            "%s of '%s' at byte offset %zu races with a write by threadgroup %u thread %d (no barrier between)",
            write ? "write" : "read", name, offset, group_of(a.writer), (a.writer - 1) % kMaxThreads);
  if (!write) return note_read(here, a);
  if (!reads_are_ordered(here, a))
    problem(pc, "RACE",
            "write of '%s' at byte offset %zu races with an earlier read by another thread (no barrier between)", name,
            offset);
  a.writer = here.thread;
  a.write_epoch = here.epoch;
  a.write_simd_epoch = here.simd_epoch;
  a.reader = 0;
  a.reader_group = 0;
}
