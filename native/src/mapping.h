// Mapping of pool chunks, or of a file in the page cache, into an engine's address space.
// Thread safety: free functions without state. Ownership: the caller unmaps what was returned.
#pragma once

#include <cstdint>
#include <span>

#include "source_file.h"

namespace sllm {

// Maps `chunks` of the pool behind `fd` one after another at one fresh address, private and writable. Every page is
// mapped now by `populate` threads, or each at its first touch where that is 0.
void* map_chunks(int fd, uint64_t chunk_bytes, std::span<const uint64_t> chunks, unsigned populate);
// Maps the described file in the same way.
void* map_file(const FileIdentity& identity, unsigned populate);
void unmap(void* address, uint64_t length_bytes);

}  // namespace sllm
