#include "reader.h"

#include <pthread.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>

namespace sllm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned kMaxThreads = 256;

void check_plan(const FilePlan& file, const Pool& pool) {
  const uint64_t chunks = (file.size_bytes + pool.chunk_bytes() - 1) / pool.chunk_bytes();
  if (file.size_bytes == 0 || file.size_bytes > uint64_t{INT64_MAX} - pool.chunk_bytes())
    throw Error(SLLM_INVALID, file.path + ": its size is out of bounds");
  if (file.chunks.size() != chunks) throw Error(SLLM_INVALID, file.path + ": the number of chunks is wrong");
  for (const uint64_t index : file.chunks)
    if (index >= pool.chunks()) throw Error(SLLM_INVALID, file.path + ": a chunk lies outside the pool");
}

}  // namespace

// Everything here but what SourceFile guards itself is guarded by Reader::mutex_.
class Load {
 public:
  struct Item {
    SourceFile& file;
    std::size_t file_index;
    std::size_t chunk;
  };

  explicit Load(std::vector<FilePlan> plans) {
    for (auto& plan : plans) {
      total_bytes_ += plan.size_bytes;
      files_.push_back(std::make_unique<SourceFile>(std::move(plan)));
    }
  }

  bool has_next() const { return !stopped_ && next_file_ < files_.size(); }
  bool idle() const { return in_flight_ == 0 && !has_next(); }
  bool ended() const { return state_ != SLLM_LOADING; }

  Item begin_next() {
    Item item{*files_[next_file_], next_file_, next_chunk_};
    if (++next_chunk_ == item.file.plan().chunks.size()) {
      ++next_file_;
      next_chunk_ = 0;
    }
    ++in_flight_;
    return item;
  }

  void complete(const BytesRead& bytes) {
    --in_flight_;
    cached_bytes_ += bytes.cached;
    device_bytes_ += bytes.device;
  }

  void fail(std::size_t file_index, Error error) {
    --in_flight_;
    stopped_ = true;
    if (error_) return;
    error_.emplace(std::move(error));
    failed_file_ = file_index;
  }

  void stop() { stopped_ = true; }

  std::vector<std::unique_ptr<SourceFile>> take_files() { return std::move(files_); }

  void end() {
    const bool complete = cached_bytes_ + device_bytes_ == total_bytes_;
    state_ = error_ ? SLLM_FAILED : complete ? SLLM_DONE : SLLM_CANCELLED;
    ended_ = Clock::now();
  }

  void describe(sllm_load_status& status) const {
    status = {};
    status.state = state_;
    status.cached_bytes = cached_bytes_;
    status.device_bytes = device_bytes_;
    status.total_bytes = total_bytes_;
    status.elapsed_s = std::chrono::duration<double>((ended() ? ended_ : Clock::now()) - begun_).count();
    if (!error_) return;
    status.failed_file = static_cast<int32_t>(failed_file_);
    status.error.code = error_->code();
    status.error.os_error = error_->os_error();
    std::strncpy(status.error.message, error_->what(), SLLM_MESSAGE_BYTES - 1);
  }

 private:
  std::vector<std::unique_ptr<SourceFile>> files_;
  std::size_t next_file_ = 0;
  std::size_t next_chunk_ = 0;
  std::size_t in_flight_ = 0;
  bool stopped_ = false;
  sllm_state state_ = SLLM_LOADING;
  std::optional<Error> error_;
  std::size_t failed_file_ = 0;
  uint64_t cached_bytes_ = 0;
  uint64_t device_bytes_ = 0;
  uint64_t total_bytes_ = 0;
  const Clock::time_point begun_ = Clock::now();
  Clock::time_point ended_;
};

Reader::Reader(Pool& pool, unsigned threads, unsigned max_loads)
    : pool_(pool), max_loads_(max_loads), event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (!event_.open()) throw Error(SLLM_NO_MEMORY, "reader: eventfd", errno);
  if (threads == 0 || threads > kMaxThreads || max_loads == 0)
    throw Error(SLLM_INVALID, "reader: the number of threads or loads is out of bounds");
  try {
    for (unsigned k = 0; k < threads; ++k) threads_.emplace_back([this] { work(); });
  } catch (...) {
    stop_threads();
    throw;
  }
}

Reader::~Reader() { stop_threads(); }

void Reader::stop_threads() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

uint64_t Reader::submit(std::vector<FilePlan> files) {
  if (files.empty()) throw Error(SLLM_INVALID, "a load without files");
  for (const auto& file : files) check_plan(file, pool_);
  auto load = std::make_shared<Load>(std::move(files));
  const std::lock_guard lock(mutex_);
  if (loads_.size() >= max_loads_) throw Error(SLLM_BUSY, "too many loads at once");
  runnable_.push_back(load);
  loads_.emplace(next_id_, std::move(load));
  wake_.notify_all();
  return next_id_++;
}

void Reader::status(uint64_t load_id, sllm_load_status& status) {
  const std::lock_guard lock(mutex_);
  find(load_id).describe(status);
}

void Reader::cancel(uint64_t load_id) {
  std::unique_lock lock(mutex_);
  Load& load = find(load_id);
  if (load.ended()) return;
  load.stop();
  std::erase_if(runnable_, [&](const auto& other) { return other.get() == &load; });
  finish_if_idle(load, lock);
}

void Reader::forget(uint64_t load_id) {
  const std::lock_guard lock(mutex_);
  if (!find(load_id).ended()) throw Error(SLLM_INVALID, "a load that has not ended can't be forgotten");
  loads_.erase(load_id);
}

Load& Reader::find(uint64_t load_id) {
  const auto found = loads_.find(load_id);
  if (found == loads_.end()) throw Error(SLLM_INVALID, "no such load");
  return *found->second;
}

void Reader::work() {
  pthread_setname_np(pthread_self(), "sllm-reader");  // As top and gdb will show it.
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !runnable_.empty(); });
    if (stopping_) return;
    read_next(lock);
  }
}

// Reads one chunk of the load whose turn it is; the lock is free while the disk works.
void Reader::read_next(std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Load> load = std::move(runnable_.front());
  runnable_.pop_front();
  const Load::Item item = load->begin_next();
  if (load->has_next()) runnable_.push_back(load);
  lock.unlock();

  BytesRead bytes;
  std::optional<Error> error;
  try {
    const FilePlan& plan = item.file.plan();
    const uint64_t offset = item.chunk * pool_.chunk_bytes();
    const uint64_t length = std::min(pool_.chunk_bytes(), plan.size_bytes - offset);
    bytes = item.file.read(offset, length, pool_.chunk(plan.chunks[item.chunk]));
  } catch (const Error& caught) {
    error.emplace(caught);
  } catch (const std::exception& caught) {
    error.emplace(SLLM_INTERNAL, caught.what());
  }

  lock.lock();
  if (error) {
    load->fail(item.file_index, std::move(*error));
    std::erase(runnable_, load);
  } else {
    load->complete(bytes);
  }
  finish_if_idle(*load, lock);
  notify();
}

// Files are closed before the end is announced, so that a load that has ended holds nothing.
void Reader::finish_if_idle(Load& load, std::unique_lock<std::mutex>& lock) {
  if (!load.idle()) return;
  auto files = load.take_files();
  lock.unlock();
  files.clear();
  lock.lock();
  load.end();
  notify();
}

void Reader::notify() const noexcept {
  // Refused only when the counter is full, and then the event is readable anyway.
  (void)eventfd_write(event_.get(), 1);
}

}  // namespace sllm
