// Ring reads files into a Pool through io_uring, with the pool's pages registered once: a read then pins none of them,
// which costs a direct read of small pages most of its processor time.
// Thread safety: any method, any thread. Ownership: owns the ring and its memory; the Pool outlives it.
//
// A caller waits for its own read. Of all who wait, one is in the kernel and takes what has come for the others, too.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include <sys/types.h>

#include "fd.h"
#include "pool.h"

namespace sllm {

class Ring {
 public:
  // At most `entries` reads at once. None where io_uring is not there or not allowed (containers often forbid it), or
  // where the process may not lock so much memory.
  static std::unique_ptr<Ring> open(const Pool& pool, unsigned entries);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // As pread(2), into one chunk of the pool; an error is a negative errno.
  ssize_t read(int fd, std::byte* target, uint64_t length, uint64_t offset);

 private:
  struct Queues;
  struct Waiter {
    int result = 0;
    bool done = false;
  };

  Ring(Fd fd, const Pool& pool, std::unique_ptr<Queues> queues);
  int submit(int fd, std::byte* target, uint64_t length, uint64_t offset, Waiter& waiter);  // Needs mutex_.
  void reap();                                                                              // Needs mutex_.

  const Fd fd_;
  const std::byte* const base_;
  const uint64_t part_bytes_;  // Of the pool, in one registered buffer: the kernel allows 1 GiB.
  std::unique_ptr<Queues> queues_;
  std::mutex mutex_;
  std::condition_variable reaped_;
  bool someone_waits_ = false;  // In the kernel. Guarded by mutex_.
};

}  // namespace sllm
