// Mapping of pool chunks into an engine's address space.
// Thread safety: free functions without state. Ownership: the caller unmaps what map_chunks returned.
#pragma once

#include <cstdint>
#include <span>

namespace sllm {

// Maps `chunks` of the pool behind `fd` one after another at one fresh address, private and writable.
void* map_chunks(int fd, uint64_t chunk_bytes, std::span<const uint64_t> chunks, bool populate);
void unmap(void* address, uint64_t length_bytes);

}  // namespace sllm
