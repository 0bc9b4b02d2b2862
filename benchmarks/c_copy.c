/* A plain copy of one or two buffers on the threads of an OpenMP runtime that is already loaded:
   what a norm's bytes cost without arithmetic, and without a dispatcher. */

#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { kMemcpy, kLoop, kStream, kLine = 64 };

typedef struct {
  char* to[2];
  const char* from[2];
  long bytes; /* of each buffer */
  int buffers, threads, form;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned); /* GOMP_parallel */
  int (*thread_num)(void);
  int (*num_threads)(void);
} Copies;

typedef char Vector __attribute__((vector_size(kLine), aligned(1), may_alias));

static void copy(int form, char* to, const char* from, long bytes) {
  long done = 0;
  if (form == kLoop) {
    for (; done + kLine <= bytes; done += kLine) {
      *(Vector*)(to + done) = *(const Vector*)(from + done);
      __asm__ volatile("" ::: "memory"); /* or the compiler calls memcpy */
    }
  }
#ifdef __SSE2__
  if (form == kStream && (long)to % 16 == 0) { /* around the caches */
    for (; done + 16 <= bytes; done += 16)
      _mm_stream_si128((__m128i*)(to + done), _mm_loadu_si128((const __m128i*)(from + done)));
    _mm_sfence();
  }
#endif
  memcpy(to + done, from + done, (size_t)(bytes - done));
}

static void part(const Copies* all, int number, int parts) {
  const long lines = (all->bytes + kLine - 1) / kLine;
  const long begin = lines * number / parts * kLine, end = lines * (number + 1) / parts * kLine;
  const long bytes = (end < all->bytes ? end : all->bytes) - begin;
  for (int i = 0; i < all->buffers; ++i)
    copy(all->form, all->to[i] + begin, all->from[i] + begin, bytes);
}

static void one_of_team(void* all) {
  const Copies* copies = all;
  part(copies, copies->thread_num(), copies->num_threads());
}

void run(Copies* all) {
  if (all->threads == 1)
    part(all, 0, 1);
  else
    all->parallel(one_of_team, all, (unsigned)all->threads, 0);
}
