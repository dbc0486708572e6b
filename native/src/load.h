// Load is one load: a cursor over the chunks of its files, what has come of them so far, and how it ended.
// Thread safety: everything is guarded by the Reader's mutex, but for the questions of devices and what SourceFile guards itself.
// Ownership: owns its files; borrows their targets.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "device.h"
#include "error.h"
#include "pool.h"
#include "source_file.h"

namespace sllm {

// A file to load.
struct FilePlan {
  FileIdentity identity;
  std::vector<uint64_t> chunks;  // Where each chunk of the file goes in the pool; empty with a window.
  std::vector<uint8_t> digests;  // XXH3-128 of each digest_bytes of the file, 16 bytes each; empty: unchecked.
  Buffer* target = nullptr;      // Where the file goes from there.
  uint64_t target_offset = 0;
};

struct LoadPlan {
  std::vector<FilePlan> files;
  int priority = 0;
  bool resident = false;  // The chunks hold the files already.
  uint64_t digest_bytes = 0;
  std::vector<uint64_t> window;  // Chunks that all files go through, one after another; empty: each has its own.
};

class Load {
 public:
  // One chunk of one file, and the chunk of the pool that it goes to.
  struct Item {
    std::size_t file;
    uint64_t offset;
    uint64_t length;
    uint64_t slot;
  };

  // Throws Error where the plan does not fit the pool, or itself.
  Load(LoadPlan plan, const Pool& pool, Ring* ring, Meters& meters);

  // Whether there is a chunk to begin with now: none is left, or every chunk of the window is taken.
  bool has_next() const;
  Item begin_next();
  // Reads the item's chunk, unless it is resident, and checks its digests. Not under the mutex.
  BytesRead fetch(const Item& item, std::byte* slot);
  // The copy that is still to be made of an item that has been fetched.
  bool has_target(const Item& item) const { return !targets_dropped_ && plan_.files[item.file].target != nullptr; }
  Buffer* target_of(const Item& item) const { return plan_.files[item.file].target; }
  // Goes on as if there were no targets; a load that goes through a window would then lead nowhere, and stops.
  void drop_targets();
  bool targets_dropped() const { return targets_dropped_; }
  Copy copy_of(const Item& item, const std::byte* slot) const;

  void fetched(const BytesRead& bytes);
  // The item is where it was to go; it never will be, as nobody wants it any more; or it failed.
  void complete(const Item& item);
  void drop(const Item& item) { release(item); }
  void fail(const Item& item, Error error);
  void stop() { stopped_.store(true, std::memory_order_release); }
  // Whether its chunks are still of use; and whether copies of them are: asked by devices, without the mutex.
  bool wanted() const { return !stopped_.load(std::memory_order_acquire); }
  bool copies_wanted() const { return wanted() && !targets_dropped_; }

  bool ended() const { return state_ != SLLM_LOADING; }
  // Whether its end is to be brought about now: true once.
  bool begin_end() { return idle() && !std::exchange(ending_, true); }
  std::vector<std::unique_ptr<SourceFile>> take_files() { return std::move(files_); }
  void end();
  void describe(sllm_load_status& status) const;

  int priority = 0;

 private:
  using Clock = std::chrono::steady_clock;

  bool idle() const { return in_flight_ == 0 && (!wanted() || next_file_ == plan_.files.size()); }
  void check_file(const FilePlan& file, const Pool& pool) const;
  void check_digests(const Item& item, const std::byte* slot) const;
  void release(const Item& item);

  const LoadPlan plan_;
  const uint64_t chunk_bytes_;
  std::vector<std::unique_ptr<SourceFile>> files_;
  std::vector<uint64_t> free_slots_;  // Of the window.
  std::size_t next_file_ = 0;
  uint64_t next_chunk_ = 0;
  std::size_t in_flight_ = 0;
  std::atomic<bool> stopped_ = false;
  std::atomic<bool> targets_dropped_ = false;
  bool ending_ = false;
  sllm_state state_ = SLLM_LOADING;
  std::optional<Error> error_;
  std::size_t failed_file_ = 0;
  uint64_t cached_bytes_ = 0;
  uint64_t device_bytes_ = 0;
  uint64_t copied_bytes_ = 0;
  uint64_t complete_bytes_ = 0;
  uint64_t total_bytes_ = 0;
  const Clock::time_point begun_ = Clock::now();
  Clock::time_point ended_;
};

}  // namespace sllm
