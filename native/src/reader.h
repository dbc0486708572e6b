// Reader is a few threads that bring whole files into chunks of one Pool, and from there to devices.
// Thread safety: any method, any thread. Ownership: owns its threads, its eventfd and its loads; borrows the Pool, and
// the targets of its loads.
//
// There is no queue of chunk reads to fill or to bound: each load is a cursor over its files, and the threads take the
// next chunk of each load in turn, of the highest priority first. So loads share the disk fairly, and submit never
// waits. The bound is max_loads; what waits for a device is bounded by the chunks of the pool.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "error.h"
#include "fd.h"
#include "load.h"
#include "meter.h"
#include "pool.h"
#include "ring.h"

namespace sllm {

class Reader {
 public:
  Reader(Pool& pool, unsigned threads, unsigned max_loads, bool use_ring);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  int event_fd() const noexcept { return event_.get(); }
  uint64_t submit(LoadPlan plan);
  void status(uint64_t load_id, sllm_load_status& status);
  void set_priority(uint64_t load_id, int priority);
  void drop_targets(uint64_t load_id);
  void cancel(uint64_t load_id);
  void forget(uint64_t load_id);
  sllm_reader_facts facts() const;

 private:
  using Runnable = std::deque<std::shared_ptr<Load>>;

  void work();
  void run_next(std::unique_lock<std::mutex>& lock);
  void send(const std::shared_ptr<Load>& load, const Load::Item& item, std::unique_lock<std::mutex>& lock);
  void arrived(const std::shared_ptr<Load>& load, const Load::Item& item, std::optional<Error> error);
  void settle(const std::shared_ptr<Load>& load, std::unique_lock<std::mutex>& lock);
  std::shared_ptr<Load> take_runnable();  // Needs mutex_, as do the next two.
  void make_runnable(const std::shared_ptr<Load>& load);
  const std::shared_ptr<Load>& find(uint64_t load_id) const;
  void stop_threads();
  void notify() const noexcept;

  Pool& pool_;
  const unsigned max_loads_;
  const Fd event_;
  const std::unique_ptr<Ring> ring_;  // Null where it was not asked for or can't be had.
  Meters meters_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable quiet_;                    // Told when copying_ comes to 0.
  std::map<uint64_t, std::shared_ptr<Load>> loads_;  // Guarded by mutex_, as is the rest.
  Runnable runnable_;                                // Loads with a chunk that can be begun.
  uint64_t next_id_ = 1;
  std::size_t copying_ = 0;  // Chunks that a device has.
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace sllm
