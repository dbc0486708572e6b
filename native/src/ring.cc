#include "ring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <vector>

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif

namespace sllm {

#if defined(IORING_FEAT_SINGLE_MMAP) && defined(__NR_io_uring_setup)

namespace {

constexpr uint64_t kMaxPart = 1ull << 30;
constexpr std::size_t kMaxParts = 1 << 14;

uint64_t part_bytes_of(const Pool& pool) { return std::max<uint64_t>(1, kMaxPart / pool.chunk_bytes()) * pool.chunk_bytes(); }

template <typename T>
T* at(void* base, uint32_t offset) {
  return reinterpret_cast<T*>(static_cast<std::byte*>(base) + offset);
}

bool register_pool(int fd, const Pool& pool) {
  const uint64_t part = part_bytes_of(pool);
  std::vector<iovec> parts;
  for (uint64_t begin = 0; begin < pool.size_bytes(); begin += part)
    parts.push_back({pool.base() + begin, std::min(part, pool.size_bytes() - begin)});
  return part <= kMaxPart && parts.size() <= kMaxParts &&
         syscall(__NR_io_uring_register, fd, IORING_REGISTER_BUFFERS, parts.data(), parts.size()) == 0;
}

}  // namespace

// The memory that is shared with the kernel.
struct Ring::Queues {
  Queues(int fd, const io_uring_params& params) : parameters(params) {
    rings_bytes = std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                           params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    constexpr int kFlags = MAP_SHARED | MAP_POPULATE;
    rings = mmap(nullptr, rings_bytes, PROT_READ | PROT_WRITE, kFlags, fd, IORING_OFF_SQ_RING);
    entries = mmap(nullptr, entries_bytes(), PROT_READ | PROT_WRITE, kFlags, fd, IORING_OFF_SQES);
  }
  ~Queues() {
    if (rings != MAP_FAILED) munmap(rings, rings_bytes);
    if (entries != MAP_FAILED) munmap(entries, entries_bytes());
  }
  Queues(const Queues&) = delete;
  Queues& operator=(const Queues&) = delete;

  bool mapped() const { return rings != MAP_FAILED && entries != MAP_FAILED; }
  std::size_t entries_bytes() const { return parameters.sq_entries * sizeof(io_uring_sqe); }
  unsigned& field(uint32_t offset) const { return *at<unsigned>(rings, offset); }

  const io_uring_params parameters;
  std::size_t rings_bytes;
  void* rings;
  void* entries;
};

std::unique_ptr<Ring> Ring::open(const Pool& pool, unsigned entries) {
  io_uring_params params{};
  Fd fd(static_cast<int>(syscall(__NR_io_uring_setup, entries, &params)));
  if (!fd.open() || (params.features & IORING_FEAT_SINGLE_MMAP) == 0) return nullptr;
  auto queues = std::make_unique<Queues>(fd.get(), params);
  if (!queues->mapped() || !register_pool(fd.get(), pool)) return nullptr;
  return std::unique_ptr<Ring>(new Ring(std::move(fd), pool, std::move(queues)));
}

Ring::Ring(Fd fd, const Pool& pool, std::unique_ptr<Queues> queues)
    : fd_(std::move(fd)), base_(pool.base()), part_bytes_(part_bytes_of(pool)), queues_(std::move(queues)) {}

Ring::~Ring() = default;

ssize_t Ring::read(int fd, std::byte* target, uint64_t length, uint64_t offset) {
  Waiter waiter;
  std::unique_lock lock(mutex_);
  if (const int error = submit(fd, target, length, offset, waiter); error != 0) return -error;
  while (!waiter.done) {
    if (someone_waits_) {
      reaped_.wait(lock);
      continue;
    }
    someone_waits_ = true;
    lock.unlock();
    // Interrupted or not: what has come is taken, and who still lacks his own asks again.
    (void)syscall(__NR_io_uring_enter, fd_.get(), 0, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
    lock.lock();
    someone_waits_ = false;
    reap();
    reaped_.notify_all();
  }
  return waiter.result;
}

// There are as many entries as reading threads, so there is always a free one.
int Ring::submit(int fd, std::byte* target, uint64_t length, uint64_t offset, Waiter& waiter) {
  const auto& offsets = queues_->parameters.sq_off;
  const std::atomic_ref<unsigned> tail(queues_->field(offsets.tail));
  const unsigned now = tail.load(std::memory_order_relaxed);
  const unsigned index = now & queues_->field(offsets.ring_mask);
  auto& entry = static_cast<io_uring_sqe*>(queues_->entries)[index];
  entry = {};
  entry.opcode = IORING_OP_READ_FIXED;
  entry.fd = fd;
  entry.addr = reinterpret_cast<uintptr_t>(target);
  entry.len = static_cast<uint32_t>(length);
  entry.off = offset;
  entry.buf_index = static_cast<uint16_t>(static_cast<uint64_t>(target - base_) / part_bytes_);
  entry.user_data = reinterpret_cast<uintptr_t>(&waiter);
  at<unsigned>(queues_->rings, offsets.array)[index] = index;
  tail.store(now + 1, std::memory_order_release);
  for (;;) {
    const long taken = syscall(__NR_io_uring_enter, fd_.get(), 1, 0, 0, nullptr, 0);
    if (taken > 0) return 0;
    const int error = taken < 0 ? errno : EAGAIN;
    if (error == EINTR) continue;
    tail.store(now, std::memory_order_release);  // The kernel has not taken it.
    return error == EBUSY ? EAGAIN : error;
  }
}

void Ring::reap() {
  const auto& offsets = queues_->parameters.cq_off;
  const std::atomic_ref<unsigned> head(queues_->field(offsets.head));
  const std::atomic_ref<unsigned> tail(queues_->field(offsets.tail));
  const unsigned mask = queues_->field(offsets.ring_mask);
  const auto* completions = at<io_uring_cqe>(queues_->rings, offsets.cqes);
  unsigned now = head.load(std::memory_order_relaxed);
  for (; now != tail.load(std::memory_order_acquire); ++now) {
    const io_uring_cqe& completion = completions[now & mask];
    auto* waiter = reinterpret_cast<Waiter*>(static_cast<uintptr_t>(completion.user_data));
    waiter->result = completion.res;
    waiter->done = true;
  }
  head.store(now, std::memory_order_release);
}

#else

struct Ring::Queues {};
std::unique_ptr<Ring> Ring::open(const Pool&, unsigned) { return nullptr; }
Ring::~Ring() = default;
ssize_t Ring::read(int, std::byte*, uint64_t, uint64_t) { return -ENOSYS; }

#endif

}  // namespace sllm
