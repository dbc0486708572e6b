// Reader is a few threads that bring whole files into chunks of one Pool.
// Thread safety: any method, any thread. Ownership: owns its threads, its eventfd and its loads; borrows the Pool.
//
// There is no queue of chunk reads to fill or to bound: each load is a cursor over its files, and the threads take the
// next chunk of each load in turn. So loads share the disk fairly, and submit never waits. The bound is max_loads.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "error.h"
#include "pool.h"
#include "source_file.h"

namespace sllm {

class Load;

class Reader {
 public:
  Reader(Pool& pool, unsigned threads, unsigned max_loads);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  int event_fd() const noexcept { return event_.get(); }
  uint64_t submit(std::vector<FilePlan> files);
  void status(uint64_t load_id, sllm_load_status& status);
  void cancel(uint64_t load_id);
  void forget(uint64_t load_id);

 private:
  void work();
  void read_next(std::unique_lock<std::mutex>& lock);
  void finish_if_idle(Load& load, std::unique_lock<std::mutex>& lock);
  void stop_threads();
  void notify() const noexcept;
  Load& find(uint64_t load_id);  // Needs mutex_.

  Pool& pool_;
  const unsigned max_loads_;
  const Fd event_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<uint64_t, std::shared_ptr<Load>> loads_;  // Guarded by mutex_.
  std::deque<std::shared_ptr<Load>> runnable_;       // Guarded by mutex_. Loads with chunks nobody has begun.
  uint64_t next_id_ = 1;                             // Guarded by mutex_.
  bool stopping_ = false;                            // Guarded by mutex_.
  std::vector<std::thread> threads_;
};

}  // namespace sllm
