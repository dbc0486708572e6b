// What the load benchmark needs at the machine's own speed: touching pages, asking what is in the page cache, and the
// limits themselves. Built by load_limits.py with the system's compiler; it shares no code with what it measures.
// Answers are 0 or an errno, unless they are counts.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, LINE = 64, MAX_THREADS = 64 };

static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

// Reads a byte of every page that any of `count` ranges lies in; returns how many it read, adds them into `sum`.
// Which byte of a page varies, since equal ones would all compete for a few lines of the processor's cache.
uint64_t bench_touch(const uint64_t* addresses, const uint64_t* lengths, uint64_t count, uint64_t* sum) {
  uint64_t pages = 0, total = 0;
  for (uint64_t i = 0; i < count; i++) {
    if (lengths[i] == 0) continue;
    uint64_t end = addresses[i] + lengths[i], page = addresses[i] / PAGE * PAGE;
    total += *(const volatile unsigned char*)addresses[i];
    for (pages++, page += PAGE; page < end; page += PAGE, pages++) {
      uint64_t at = page + page / PAGE * 5 % (PAGE / LINE) * LINE;
      total += *(const volatile unsigned char*)(at < end ? at : page);
    }
  }
  *sum += total;
  return pages;
}

// Counts the bytes of a file that are in the page cache, in whole pages.
int bench_resident(const char* path, uint64_t* bytes) {
  int error = 0, fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat found;
  *bytes = 0;
  if (fd < 0) return errno;
  if (fstat(fd, &found)) {
    error = errno;
  } else if (found.st_size > 0) {
    size_t pages = ((size_t)found.st_size + PAGE - 1) / PAGE;
    unsigned char* flags = malloc(pages);
    void* mapped = mmap(NULL, (size_t)found.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (flags == NULL || mapped == MAP_FAILED || mincore(mapped, (size_t)found.st_size, flags)) error = errno;
    for (size_t i = 0; i < pages && error == 0; i++) *bytes += (flags[i] & 1) * (uint64_t)PAGE;
    if (mapped != MAP_FAILED) munmap(mapped, (size_t)found.st_size);
    free(flags);
  }
  close(fd);
  return error;
}

// One job that a few threads share: each takes the next block until none is left.
struct job {
  int fd;  // -1: copy from `from`.
  char* to;
  const char* from;
  uint64_t length, block;
  _Atomic uint64_t next;
  _Atomic int error;
};

static void* work(void* given) {
  struct job* job = given;
  for (;;) {
    uint64_t at = atomic_fetch_add(&job->next, job->block);
    if (at >= job->length || job->error) return NULL;
    uint64_t left = job->length - at < job->block ? job->length - at : job->block;
    if (job->fd < 0) {
      memcpy(job->to + at, job->from + at, left);
      continue;
    }
    // Whole pages are asked for, as O_DIRECT wants it; the file's end cuts the last one short.
    uint64_t ask = (left + PAGE - 1) / PAGE * PAGE, got = 0;
    while (got < left) {
      ssize_t read = pread(job->fd, job->to + at + got, ask - got, (off_t)(at + got));
      if (read <= 0) {
        job->error = read < 0 ? errno : EIO;
        return NULL;
      }
      got += (uint64_t)read;
    }
  }
}

static double share_out(struct job* job, int threads) {
  pthread_t started[MAX_THREADS];
  int running = 0;
  double begin_s = now_s();
  if (threads == 1) {
    work(job);
    return now_s() - begin_s;
  }
  while (running < threads && running < MAX_THREADS) {
    int error = pthread_create(&started[running], NULL, work, job);
    if (error) {
      job->error = error;
      break;
    }
    running++;
  }
  while (running > 0) pthread_join(started[--running], NULL);
  return now_s() - begin_s;
}

// Reads the first `length` bytes of a file into `buffer`, which has room for whole pages and begins on one.
int bench_read(const char* path, void* buffer, uint64_t length, uint64_t block, int threads, int direct,
               double* seconds) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
  if (fd < 0) return errno;
  struct job job = {.fd = fd, .to = buffer, .length = length, .block = block};
  *seconds = share_out(&job, threads);
  close(fd);
  return job.error;
}

int bench_copy(void* to, const void* from, uint64_t length, uint64_t block, int threads, double* seconds) {
  struct job job = {.fd = -1, .to = to, .from = from, .length = length, .block = block};
  *seconds = share_out(&job, threads);
  return job.error;
}

// Gives zeroed memory: faulted in with huge pages where the machine gives them, or not yet faulted at all.
void* bench_memory(uint64_t length, int faulted) {
  char* memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return NULL;
  if (faulted) {
    madvise(memory, length, MADV_HUGEPAGE);
    for (uint64_t at = 0; at < length; at += PAGE) ((volatile char*)memory)[at] = 1;
  }
  return memory;
}

void bench_free(void* memory, uint64_t length) {
  munmap(memory, length);
}
