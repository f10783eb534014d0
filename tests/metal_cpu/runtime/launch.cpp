// One dispatch, as Metal's dispatchThreads does it: threadgroups of min(group, grid) threads, smaller ones at the
// grid's edges.
#include <link.h>

#include <algorithm>

#include "runtime.h"

namespace {
struct Image {
  uintptr_t address, begin, end;
};
}  // namespace

static int find_image(dl_phdr_info* info, size_t, void* data) {
  Image* image = (Image*)data;
  uintptr_t begin = ~(uintptr_t)0, end = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + header.p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  if (image->address < begin || image->address >= end) return 0;
  image->begin = begin;
  image->end = end;
  return 1;
}

static Image image_of(uintptr_t address) {
  Image image{address, 0, 0};
  dl_iterate_phdr(find_image, &image);
  return image;
}

static void begin_launch(const LaunchOptions& options) {
  machine.options = options;
  machine.counts = {};
  machine.report.clear();
  machine.reported.clear();
  machine.kinds.clear();
  machine.timed_out = false;
  machine.current = nullptr;
  machine.random_state = 0x9E3779B97F4A7C15ull ^ (options.seed * 0xD1342543DE82EF95ull);
  if (!machine.random_state) machine.random_state = 1;
  Image image = image_of((uintptr_t)options.entry), runtime = image_of((uintptr_t)&begin_launch);
  machine.image_begin = image.begin;
  machine.image_end = image.end;
  machine.runtime_begin = runtime.begin;
  machine.runtime_end = runtime.end;
  fibers_prepare();
}

// Threads of the threadgroup at `position`, and what each of them is told about itself.
static void place_threads(const uint32_t position[3], const uint32_t full[3], const uint32_t groups[3]) {
  const uint32_t* grid = machine.options.grid;
  uint32_t extent[3];
  for (int k = 0; k < 3; k++) extent[k] = std::min(full[k], grid[k] - position[k] * full[k]);
  machine.threads = (int)(extent[0] * extent[1] * extent[2]);
  machine.simdgroup_count = (machine.threads + 31) / 32;
  for (int i = 0; i < machine.threads; i++) {
    MtlThread& t = machine.lanes[i].thread;
    uint32_t within[3] = {i % extent[0], i / extent[0] % extent[1], i / extent[0] / extent[1]};
    for (int k = 0; k < 3; k++) {
      t.position_in_group[k] = within[k];
      t.position_in_grid[k] = position[k] * full[k] + within[k];
      t.group_position[k] = position[k];
      t.groups_in_grid[k] = groups[k];
      t.grid[k] = grid[k];
      t.group[k] = extent[k];
      t.full_group[k] = full[k];
    }
    t.index_in_group = i;
    t.lane = i & 31;
    t.simdgroup = i >> 5;
    t.simdgroups = machine.simdgroup_count;
    t.full_simdgroups = (full[0] * full[1] * full[2] + 31) / 32;
  }
}

static void run_groups() {
  const LaunchOptions& o = machine.options;
  uint32_t full[3], groups[3];
  for (int k = 0; k < 3; k++) {
    full[k] = std::min(o.group[k], o.grid[k]);
    groups[k] = (o.grid[k] + full[k] - 1) / full[k];
  }
  uint64_t total = (uint64_t)groups[0] * groups[1] * groups[2];
  uint64_t last = std::min(total, o.first_group + std::min(total, o.group_count));
  for (uint64_t index = o.first_group; index < last && !machine.timed_out; index++) {
    uint32_t position[3] = {(uint32_t)(index % groups[0]), (uint32_t)(index / groups[0] % groups[1]),
                            (uint32_t)(index / groups[0] / groups[1])};
    machine.group_index = (uint32_t)index;
    place_threads(position, full, groups);
    threadgroup_memory_reset();
    run_threadgroup();
    if (o.profile) profile_group_end();
    machine.counts.threads += machine.threads;
  }
  if (machine.timed_out) problem(0, "TIMEOUT", "the launch was stopped after %.3g s of CPU time", o.limit_s);
  bool whole = o.first_group == 0 && last == total && !machine.timed_out;
  size_t missing;
  for (const Buffer& buffer : machine.buffers)
    if (whole && is_output_incomplete(buffer, missing))
      problem(0, "UNWRITTEN", "output '%s': %zu of %zu B were never written", buffer.name.c_str(), missing,
              buffer.bytes);
}

// Runs the launch; outputs are copied back to their hosts. Returns the report, which lives until the next launch, or
// null when the address space for the buffers could not be had.
extern "C" const char* mtl_launch(const BufferArgument* arguments, int count, const LaunchOptions* options,
                                  LaunchCounts* counts) {
  begin_launch(*options);
  std::vector<void*> pointers;
  if (!memory_map(arguments, count, pointers)) {
    memory_unmap();
    return nullptr;
  }
  machine.arguments = pointers.data();
  if (options->profile) profile_begin();
  faults_install();
  run_groups();
  faults_remove();
  if (options->profile) profile_end();
  for (const auto& [kind, times] : machine.kinds) report_line("KIND\t%s\t%lu", kind.c_str(), times);
  memory_return(arguments, count);
  memory_unmap();
  *counts = machine.counts;
  return machine.report.c_str();
}
