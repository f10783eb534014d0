// Counts for mode "profile". The n-th execution of a load or store by each lane of a simdgroup, between two exchanges,
// is taken as one simdgroup instruction. A basic block is issued as often as the lane that runs it most.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "runtime.h"

namespace {
struct Span {
  uintptr_t address;
  uint32_t bytes;
};
struct Instruction {
  int lanes = 0;
  Span spans[32];
};
struct Site {
  int buffer;  // -1: threadgroup memory
  bool write;
  std::vector<Instruction> pending;
  size_t used = 0;
  uint32_t executed[32] = {};
  uint64_t instructions = 0, lanes = 0, bank_cycles = 0;
};
}  // namespace

static std::unordered_map<uintptr_t, Site> sites;
static std::vector<Site*> dirty;
static uint64_t exchanges[MTL_OP_COUNT], exchange_words[MTL_OP_COUNT], exchange_lanes[MTL_OP_COUNT];
static uint32_t block_count;            // of the largest kernel loaded so far
static std::vector<uint32_t> executed;  // [thread][block]
static std::vector<uint64_t> block_lanes, block_issues;

void profile_begin() {
  sites.clear();
  dirty.clear();
  std::fill(exchanges, exchanges + MTL_OP_COUNT, 0);
  std::fill(exchange_words, exchange_words + MTL_OP_COUNT, 0);
  std::fill(exchange_lanes, exchange_lanes + MTL_OP_COUNT, 0);
  executed.assign((size_t)kMaxThreads * (block_count + 1), 0);
  block_lanes.assign(block_count + 1, 0);
  block_issues.assign(block_count + 1, 0);
}

static void mark_read(Buffer& buffer, size_t offset, size_t bytes) {
  for (size_t end = offset + bytes; offset < end;) {
    size_t within = offset % 64, count = std::min(64 - within, end - offset);
    buffer.read_lines[offset / 64] |= (count == 64 ? ~0ull : (1ull << count) - 1) << within;
    offset += count;
  }
}

void profile_access(uintptr_t address, size_t bytes, bool write, int buffer, uintptr_t pc) {
  if (buffer >= 0) {
    Buffer& b = machine.buffers[buffer];
    (write ? b.requested_written : b.requested_read) += bytes;
    if (!write) mark_read(b, address - (uintptr_t)b.begin, bytes);
  }
  Site& site = sites[pc * 2 + write];
  site.buffer = buffer;
  site.write = write;
  size_t nth = site.executed[machine.current->thread.lane]++;
  if (site.used == 0) dirty.push_back(&site);
  if (nth >= site.pending.size()) site.pending.resize(nth + 1);
  site.used = std::max(site.used, nth + 1);
  Instruction& instruction = site.pending[nth];
  instruction.spans[instruction.lanes++ & 31] = {address, (uint32_t)bytes};
}

// Bytes that the lanes of one instruction touch, each once.
static uint64_t distinct_bytes(Instruction& instruction) {
  std::sort(instruction.spans, instruction.spans + instruction.lanes,
            [](Span a, Span b) { return a.address < b.address; });
  uint64_t bytes = 0;
  uintptr_t end = 0;
  for (int i = 0; i < instruction.lanes; i++) {
    uintptr_t first = std::max(instruction.spans[i].address, end),
              last = instruction.spans[i].address + instruction.spans[i].bytes;
    if (last > first) bytes += last - first;
    end = std::max(end, last);
  }
  return bytes;
}

// Passes that 32 banks of 4 bytes need for the distinct words of one instruction (an assumption about Apple's
// hardware).
static uint64_t bank_cycles(const Instruction& instruction) {
  std::vector<uintptr_t> words;
  for (int i = 0; i < instruction.lanes; i++) {
    const Span& span = instruction.spans[i];
    for (uintptr_t w = span.address / 4; w <= (span.address + span.bytes - 1) / 4; w++) words.push_back(w);
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  uint64_t load[32] = {}, most = 0;
  for (uintptr_t w : words) most = std::max(most, ++load[w & 31]);
  return most;
}

void profile_flush() {
  for (Site* site : dirty) {
    for (size_t i = 0; i < site->used; i++) {
      Instruction& instruction = site->pending[i];
      instruction.lanes = std::min(instruction.lanes, 32);
      site->instructions++;
      site->lanes += instruction.lanes;
      if (site->buffer < 0)
        site->bank_cycles += bank_cycles(instruction);
      else if (!site->write)
        machine.buffers[site->buffer].fetched += distinct_bytes(instruction);
      instruction.lanes = 0;
    }
    site->used = 0;
    std::fill(site->executed, site->executed + 32, 0);
  }
  dirty.clear();
}

void profile_exchange(const Lane* lane, uint32_t lanes) {
  profile_flush();
  exchanges[lane->op]++;
  exchange_words[lane->op] += std::max(1u, (lane->size + 3) / 4);
  exchange_lanes[lane->op] += __builtin_popcount(lanes) * std::max(1u, (lane->size + 3) / 4);
}

// Blocks of the threadgroup that just ended: lanes that ran them, and the most executed lane of each simdgroup.
void profile_group_end() {
  size_t stride = block_count + 1;
  for (int first = 0; first < machine.threads; first += 32) {
    int last = std::min(first + 32, machine.threads);
    for (size_t block = 1; block < stride; block++) {
      uint32_t most = 0;
      for (int thread = first; thread < last; thread++) {
        uint32_t& count = executed[thread * stride + block];
        block_lanes[block] += count;
        most = std::max(most, count);
        count = 0;
      }
      block_issues[block] += most;
    }
  }
}

static void report_buffer(const Buffer& b) {
  uint64_t bytes = 0;
  for (const auto& [line, mask] : b.read_lines) bytes += __builtin_popcountll(mask);
  report_line("BUFFER\t%s\t%lu\t%lu\t%lu\t%lu\t%lu\t%lu", b.name.c_str(), b.bytes, b.requested_read, b.fetched, bytes,
              b.read_lines.size() * 64, b.requested_written);
}

void profile_end() {
  for (const Buffer& buffer : machine.buffers) report_buffer(buffer);
  for (auto& [key, site] : sites) {
    long offset = (long)(key / 2 - 1 - machine.image_begin);
    report_line("SITE\t%ld\t%s\t%s\t%lu\t%lu\t%lu", offset, site.buffer < 0 ? "threadgroup" : "device",
                site.write ? "write" : "read", site.instructions, site.lanes, site.bank_cycles);
  }
  for (uint32_t op = 0; op < MTL_OP_COUNT; op++)
    if (exchanges[op])
      report_line("SIMD\t%u\t%lu\t%lu\t%lu", op, exchanges[op], exchange_words[op], exchange_lanes[op]);
  for (size_t block = 1; block < block_issues.size(); block++)
    if (block_issues[block]) report_line("BLOCK\t%zu\t%lu\t%lu", block, block_lanes[block], block_issues[block]);
}

// Called by clang's instrumentation: numbers the blocks when a kernel is loaded, counts them when they run.
extern "C" void __sanitizer_cov_trace_pc_guard_init(uint32_t* begin, uint32_t* end) {
  if (begin == end || *begin) return;
  uint32_t number = 0;
  for (uint32_t* guard = begin; guard < end; guard++) *guard = ++number;
  block_count = std::max(block_count, number);
}

extern "C" void __sanitizer_cov_trace_pc_guard(uint32_t* guard) {
  if (!machine.current || block_issues.empty()) return;
  executed[machine.current->thread.index_in_group * (block_count + 1) + *guard]++;
}
