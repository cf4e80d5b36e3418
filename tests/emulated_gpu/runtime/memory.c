// Memory of the devices and pinned memory, both from malloc, and the copies between them.
#include "runtime.h"
#include <stdlib.h>
#include <string.h>

#define GARBAGE 0xA5  // what the host finds where a copy has not arrived

typedef struct Range {
  char *first;
  size_t size;
  int device;
  struct Range *next;
} Range;

long emulated_pageable, emulated_pinned_bytes;
PUBLIC long emulated_pinned_most = 1l << 40;  // a test makes pinned memory scarce
PUBLIC long emulated_device_most = 80l << 30;  // or that of each device
static Range *pinned, *on_devices;
static size_t used[MOST_DEVICES];

static void add(Range **list, void *pointer, size_t size) {
  Range *range = malloc(sizeof *range);
  *range = (Range){.first = pointer, .size = size, .device = current, .next = *list};
  *list = range;
}
static Range *find(Range *list, const void *pointer) {
  for (const char *p = pointer; list; list = list->next)
    if (p >= list->first && p < list->first + list->size) return list;
  return 0;
}
static Range take(Range **list, void *pointer) {
  for (Range **at = list; *at; at = &(*at)->next)
    if ((*at)->first == pointer) {
      Range *range = *at, copy = *range;
      *at = range->next;
      free(range);
      return copy;
    }
  return (Range){0};
}

PUBLIC cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  *total = emulated_device_most;
  *left = *total - used[current];
  return cudaSuccess;
}
PUBLIC cudaError_t cudaMalloc(void **pointer, size_t size) {
  cudaError_t error = cudaSuccess;
  *pointer = 0;
  pthread_mutex_lock(&lock);
  if (used[current] + size > (size_t)emulated_device_most || posix_memalign(pointer, 512, size ? size : 1))
    error = failed(cudaErrorMemoryAllocation);
  else {
    used[current] += size;
    add(&on_devices, *pointer, size);
  }
  pthread_mutex_unlock(&lock);
  return error;
}
PUBLIC cudaError_t cudaFree(void *pointer) {
  if (!pointer) return cudaSuccess;
  pthread_mutex_lock(&lock);
  wait_for_all();
  Range gone = take(&on_devices, pointer);
  used[gone.device] -= gone.size;
  free(pointer);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&lock);
  if (emulated_pinned_bytes + (long)size > emulated_pinned_most ||
      posix_memalign(pointer, 4096, size ? size : 1))
    error = failed(cudaErrorMemoryAllocation);
  else {
    emulated_pinned_bytes += size;
    add(&pinned, *pointer, size);
  }
  pthread_mutex_unlock(&lock);
  return error;
}
PUBLIC cudaError_t cudaFreeHost(void *pointer) {
  pthread_mutex_lock(&lock);
  wait_for_all();
  emulated_pinned_bytes -= take(&pinned, pointer).size;
  free(pointer);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
  pthread_mutex_lock(&lock);
  add(&pinned, pointer, size);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaHostUnregister(void *pointer) {
  pthread_mutex_lock(&lock);
  wait_for_all();
  take(&pinned, pointer);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found,
                                            const void *pointer) {
  memset(found, 0, sizeof *found);
  pthread_mutex_lock(&lock);
  Range *device = find(on_devices, pointer);
  found->type = device ? cudaMemoryTypeDevice
                : find(pinned, pointer) ? cudaMemoryTypeHost
                                        : cudaMemoryTypeUnregistered;
  found->device = device ? device->device : current;
  pthread_mutex_unlock(&lock);
  found->hostPointer = found->devicePointer = (void *)pointer;
  return cudaSuccess;
}

// To the device: the bytes are there at once, since what follows is computed at once; a pinned
// source is looked at again when the device would have read it. To pinned memory: garbage until
// the host waits. Copies of pageable memory wait.
PUBLIC cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size,
                                   enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (!size) return cudaSuccess;
  pthread_mutex_lock(&lock);
  int number = number_of(stream), source = !!find(on_devices, from);
  int target = !!find(on_devices, to);
  if (source && !target) {
    if (find(pinned, to)) {
      begin_late(number, 1, to, from, size);
      memset(to, GARBAGE, size);
    } else {
      emulated_pageable++;
      wait_for_stream(number);
      memcpy(to, from, size);
    }
  } else {
    memcpy(to, from, size);
    if (target && !source) {
      if (find(pinned, from)) begin_late(number, 0, (void *)from, from, size);
      else emulated_pageable++;
    }
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  pthread_mutex_lock(&lock);
  emulated_waits++;
  wait_for_all();
  memcpy(to, from, size);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source,
                                       size_t size, cudaStream_t stream) {
  memcpy(to, from, size);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaMemset(void *pointer, int value, size_t size) {
  memset(pointer, value, size);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
  memset(pointer, value, size);
  return cudaSuccess;
}
