/* Counts what is allocated by the program that this is loaded into, by way of LD_PRELOAD.

   glibc gives its own functions a second name each, which is what is called here. Run with
   PYTHONMALLOC=malloc, or Python would serve small objects from pools of its own, uncounted. */

#include <stddef.h>
#include <stdint.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

/* Calls, and the bytes asked for. */
uint64_t allocations[2];

static void count(size_t size)
{
    __atomic_fetch_add(&allocations[0], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&allocations[1], size, __ATOMIC_RELAXED);
}

void *malloc(size_t size)
{
    count(size);
    return __libc_malloc(size);
}

void *calloc(size_t number, size_t size)
{
    count(number * size);
    return __libc_calloc(number, size);
}

void *realloc(void *old, size_t size)
{
    count(size);
    return __libc_realloc(old, size);
}
