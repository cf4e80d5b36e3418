// Streams and events: what the host can know to have happened.
//
// The device is as slow as it may be: it has done what the host has waited for and nothing else.
// Each stream counts its operations, and knows of each other stream how many of those come before
// its own next one. An event is a copy of what its stream knew.
#define _GNU_SOURCE
#include "runtime.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PATIENCE 100  // after so many questions whether it is ready the device has come so far

typedef struct Late {
  long at;      // which operation of its stream
  int to_host;  // or from the host's pinned memory
  char *host, *held;
  size_t size;
  struct Late *next;
} Late;
typedef struct {
  long known[MOST_STREAMS];
  int asked;
  struct timespec recorded;
} Event;

long emulated_waits, emulated_event_waits, emulated_races;
static long known[MOST_STREAMS][MOST_STREAMS];  // [s][s]: how many operations s was given
static long done[MOST_STREAMS];
static int asked[MOST_STREAMS], num_streams = MOST_DEVICES;
static Late *first[MOST_STREAMS], *last[MOST_STREAMS];

int number_of(cudaStream_t stream) {
  size_t handle = (size_t)stream;  // 0 to 2 are CUDA's names of the default stream
  return handle <= 2 ? current : (int)(handle - 8);
}

static void reach(int stream, long at) {
  while (first[stream] && first[stream]->at <= at) {
    Late *copy = first[stream];
    if (copy->to_host) memcpy(copy->host, copy->held, copy->size);
    else if (memcmp(copy->host, copy->held, copy->size)) emulated_races++;
    first[stream] = copy->next;
    free(copy->held);
    free(copy);
  }
  if (!first[stream]) last[stream] = 0;
  if (at > done[stream]) done[stream] = at;
}
static void reach_all_of(const long *points) {
  for (int s = 0; s < num_streams; s++) reach(s, points[s]);
}
static int is_reached(const long *points) {
  for (int s = 0; s < num_streams; s++)
    if (points[s] > done[s]) return 0;
  return 1;
}
static cudaError_t ask(const long *points, int *times) {
  if (is_reached(points)) return cudaSuccess;
  if (++*times < PATIENCE) return cudaErrorNotReady;
  *times = 0;
  reach_all_of(points);
  return cudaSuccess;
}

// A copy from or to pinned memory; the host's part of it happens when the host waits for it.
void begin_late(int stream, int to_host, void *host, const void *data, size_t size) {
  Late *copy = malloc(sizeof *copy);
  *copy = (Late){.at = ++known[stream][stream], .to_host = to_host, .host = host, .size = size};
  copy->held = malloc(size);
  memcpy(copy->held, data, size);
  if (last[stream]) last[stream]->next = copy;
  else first[stream] = copy;
  last[stream] = copy;
}
// For what computes: where a stream is, and whether another one goes on behind such a point.
PUBLIC long emulated_position(cudaStream_t stream) {
  pthread_mutex_lock(&lock);
  int number = number_of(stream);
  long at = known[number][number];
  pthread_mutex_unlock(&lock);
  return at;
}
PUBLIC int emulated_is_behind(cudaStream_t stream, cudaStream_t other, long at) {
  pthread_mutex_lock(&lock);
  int number = number_of(other);
  int is_behind = known[number_of(stream)][number] >= at || done[number] >= at;
  pthread_mutex_unlock(&lock);
  return is_behind;
}
void wait_for_stream(int stream) { reach_all_of(known[stream]); }
void wait_for_all(void) {
  for (int s = 0; s < num_streams; s++) reach(s, known[s][s]);
}

static cudaError_t make_stream(cudaStream_t *stream) {
  pthread_mutex_lock(&lock);
  int number = num_streams < MOST_STREAMS ? num_streams++ : -1;
  pthread_mutex_unlock(&lock);
  if (number < 0) return failed(cudaErrorNotSupported);
  *stream = (cudaStream_t)(size_t)(number + 8);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamCreate(cudaStream_t *stream) { return make_stream(stream); }
PUBLIC cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return make_stream(stream);
}
PUBLIC cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int level) {
  return make_stream(stream);
}
PUBLIC cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
PUBLIC cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) {
  *least = 0;
  *most = -5;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *level) {
  *level = 0;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                         enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamQuery(cudaStream_t stream) {
  pthread_mutex_lock(&lock);
  int number = number_of(stream);
  cudaError_t answer = ask(known[number], &asked[number]);
  pthread_mutex_unlock(&lock);
  return answer;
}
PUBLIC cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  pthread_mutex_lock(&lock);
  emulated_waits++;
  wait_for_stream(number_of(stream));
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceSynchronize(void) {
  pthread_mutex_lock(&lock);
  emulated_waits++;
  wait_for_all();
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  pthread_mutex_lock(&lock);
  long *mine = known[number_of(stream)], *theirs = ((Event *)event)->known;
  for (int s = 0; s < MOST_STREAMS; s++)
    if (theirs[s] > mine[s]) mine[s] = theirs[s];
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                         void *data, unsigned flags) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}

PUBLIC cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = (cudaEvent_t)calloc(1, sizeof(Event));
  return cudaSuccess;
}
PUBLIC cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, 0);
}
PUBLIC cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  pthread_mutex_lock(&lock);
  int number = number_of(stream);
  Event *mine = (Event *)event;
  known[number][number]++;
  memcpy(mine->known, known[number], sizeof mine->known);
  mine->asked = 0;
  clock_gettime(CLOCK_MONOTONIC, &mine->recorded);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                            unsigned flags) {
  return cudaEventRecord(event, stream);
}
PUBLIC cudaError_t cudaEventQuery(cudaEvent_t event) {
  pthread_mutex_lock(&lock);
  cudaError_t answer = ask(((Event *)event)->known, &((Event *)event)->asked);
  pthread_mutex_unlock(&lock);
  return answer;
}
PUBLIC cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  pthread_mutex_lock(&lock);
  emulated_event_waits++;
  reach_all_of(((Event *)event)->known);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
// The host computes the kernels as they are started: its clock is the device's.
PUBLIC cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  struct timespec a = ((Event *)from)->recorded, b = ((Event *)to)->recorded;
  *ms = (b.tv_sec - a.tv_sec) * 1e3f + (b.tv_nsec - a.tv_nsec) * 1e-6f;
  return cudaSuccess;
}
