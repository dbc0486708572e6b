#include "load.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <string>

#include "xxh3.h"

namespace sllm {
namespace {

constexpr uint64_t kDigestBytes = 16;

std::string hex(const uint8_t* digest) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : std::span(digest, kDigestBytes)) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

// Reads a byte of every page. Under a hypervisor the first access to a page that no processor has used for a while is
// slow, in whichever process it happens: some 0.1 s for the 640,000 pages of 2.6 GB. Here it is hidden by the disk.
void use_pages(const std::byte* begin, uint64_t length) {
  for (uint64_t at = 0; at < length; at += kAlignment)
    (void)*reinterpret_cast<const volatile std::byte*>(begin + at);
}

uint64_t pieces(uint64_t length, uint64_t of) { return (length + of - 1) / of; }

}  // namespace

Load::Load(LoadPlan plan, const Pool& pool, Ring* ring, Meters& meters)
    : priority(plan.priority), plan_(std::move(plan)), chunk_bytes_(pool.chunk_bytes()), free_slots_(plan_.window) {
  if (plan_.files.empty()) throw Error(SLLM_INVALID, "a load without files");
  if (plan_.digest_bytes != 0 && chunk_bytes_ % plan_.digest_bytes != 0)
    throw Error(SLLM_INVALID, "a digest of " + std::to_string(plan_.digest_bytes) +
                                  " bytes does not divide a chunk of " + std::to_string(chunk_bytes_));
  if (!plan_.window.empty() && plan_.resident) throw Error(SLLM_INVALID, "what is resident needs no window");
  for (const uint64_t slot : plan_.window)
    if (slot >= pool.chunks()) throw Error(SLLM_INVALID, "a chunk of the window lies outside the pool");
  for (const FilePlan& file : plan_.files) {
    check_file(file, pool);
    total_bytes_ += file.identity.size_bytes;
    if (!plan_.resident)
      files_.push_back(
          std::make_unique<SourceFile>(file.identity, pieces(file.identity.size_bytes, chunk_bytes_), ring, meters));
  }
}

void Load::check_file(const FilePlan& file, const Pool& pool) const {
  const auto refuse = [&](const char* what) { throw Error(SLLM_INVALID, file.identity.path + ": " + what); };
  const uint64_t size = file.identity.size_bytes;
  if (size == 0 || size > uint64_t{INT64_MAX} - chunk_bytes_) refuse("its size is out of bounds");
  if (plan_.window.empty() ? file.chunks.size() != pieces(size, chunk_bytes_) : !file.chunks.empty())
    refuse("the number of chunks is wrong");
  for (const uint64_t index : file.chunks)
    if (index >= pool.chunks()) refuse("a chunk lies outside the pool");
  if (!plan_.window.empty() && file.target == nullptr) refuse("a window leads nowhere without a target");
  if (!file.digests.empty() && (plan_.digest_bytes == 0 ||
                                file.digests.size() != pieces(size, plan_.digest_bytes) * kDigestBytes))
    refuse("the number of digests is wrong");
  if (file.target != nullptr &&
      (file.target_offset > file.target->size_bytes() || size > file.target->size_bytes() - file.target_offset))
    refuse("it does not fit into its target");
}

bool Load::has_next() const {
  return wanted() && next_file_ < plan_.files.size() && (plan_.window.empty() || !free_slots_.empty());
}

Load::Item Load::begin_next() {
  const FilePlan& file = plan_.files[next_file_];
  const uint64_t offset = next_chunk_ * chunk_bytes_;
  Item item{next_file_, offset, std::min(chunk_bytes_, file.identity.size_bytes - offset), 0};
  if (plan_.window.empty()) {
    item.slot = file.chunks[next_chunk_];
  } else {
    item.slot = free_slots_.back();
    free_slots_.pop_back();
  }
  if (offset + item.length == file.identity.size_bytes) {
    ++next_file_;
    next_chunk_ = 0;
  } else {
    ++next_chunk_;
  }
  ++in_flight_;
  return item;
}

BytesRead Load::fetch(const Item& item, std::byte* slot) {
  BytesRead bytes;
  if (!plan_.resident) bytes = files_[item.file]->read(item.offset, item.length, slot);
  const FilePlan& file = plan_.files[item.file];
  if (!file.digests.empty())
    check_digests(item, slot);
  else if (file.target == nullptr)  // A device's copy is no access of a processor; nor is a direct read.
    use_pages(slot + bytes.cached, bytes.device);
  return bytes;
}

void Load::check_digests(const Item& item, const std::byte* slot) const {
  const FilePlan& file = plan_.files[item.file];
  for (uint64_t at = 0; at < item.length; at += plan_.digest_bytes) {
    uint8_t found[kDigestBytes];
    xxh3_128(slot + at, std::min(plan_.digest_bytes, item.length - at), found);
    const uint64_t number = (item.offset + at) / plan_.digest_bytes;
    const uint8_t* expected = file.digests.data() + number * kDigestBytes;
    if (std::memcmp(found, expected, kDigestBytes) != 0)
      throw Error(SLLM_DIGEST, file.identity.path + ": chunk " + std::to_string(number) + " has the digest " +
                                   hex(found) + " and should have " + hex(expected));
  }
}

Copy Load::copy_of(const Item& item, const std::byte* slot) const {
  const FilePlan& file = plan_.files[item.file];
  Copy copy;
  copy.from = slot;
  copy.to = file.target;
  copy.offset = file.target_offset + item.offset;
  copy.length = item.length;
  return copy;
}

void Load::drop_targets() {
  targets_dropped_ = true;
  if (!plan_.window.empty()) stop();
}

void Load::fetched(const BytesRead& bytes) {
  cached_bytes_ += bytes.cached;
  device_bytes_ += bytes.device;
}

void Load::complete(const Item& item) {
  complete_bytes_ += item.length;
  if (has_target(item)) copied_bytes_ += item.length;
  release(item);
}

void Load::release(const Item& item) {
  --in_flight_;
  if (!plan_.window.empty()) free_slots_.push_back(item.slot);
}

void Load::fail(const Item& item, Error error) {
  release(item);
  stop();
  if (error_) return;
  error_.emplace(std::move(error));
  failed_file_ = item.file;
}

void Load::end() {
  state_ = error_ ? SLLM_FAILED : complete_bytes_ == total_bytes_ ? SLLM_DONE : SLLM_CANCELLED;
  ended_ = Clock::now();
}

void Load::describe(sllm_load_status& status) const {
  status = {};
  status.state = state_;
  status.cached_bytes = cached_bytes_;
  status.device_bytes = device_bytes_;
  status.copied_bytes = copied_bytes_;
  status.total_bytes = total_bytes_;
  status.elapsed_s = std::chrono::duration<double>((ended() ? ended_ : Clock::now()) - begun_).count();
  if (!error_) return;
  status.failed_file = static_cast<int32_t>(failed_file_);
  status.error.code = error_->code();
  status.error.os_error = error_->os_error();
  std::strncpy(status.error.message, error_->what(), SLLM_MESSAGE_BYTES - 1);
}

}  // namespace sllm
