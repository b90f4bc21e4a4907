/* Shifts the wall clock of a process by the seconds that the file $CHAOS_CLOCK holds; the monotonic
   clock runs on, as it does when a host's time is set. Preloaded; libfaketime breaks time.sleep.
   Waits until a time of day are given the kernel's own, or they would last as long as the shift. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
  const char *path = getenv("CHAOS_CLOCK");
  char text[32] = {0};
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  long got = read(file, text, sizeof text - 1);
  close(file);
  return got > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int code = syscall(SYS_clock_gettime, clock, now);
  if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    now->tv_sec += shift();
  return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int code = syscall(SYS_gettimeofday, now, zone);
  if (code == 0) now->tv_sec += shift();
  return code;
}

time_t time(time_t *where) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (where) *where = now.tv_sec;
  return now.tv_sec;
}

static struct timespec real(const struct timespec *until) {
  struct timespec moved = *until;
  /* Deadlines on the monotonic clock count from the boot of the machine: decades less. */
  if (moved.tv_sec > 1000000000) moved.tv_sec -= shift();
  return moved;
}

int pthread_cond_timedwait(pthread_cond_t *restrict signal, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  struct timespec moved = real(until);
  if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  return next(signal, mutex, &moved);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
  static int (*next)(sem_t *, const struct timespec *);
  struct timespec moved = real(until);
  if (!next) next = dlsym(RTLD_NEXT, "sem_timedwait");
  return next(semaphore, &moved);
}
