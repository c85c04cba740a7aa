// The work of a source that takes its time: so much CPU time, as a kernel's walk over page tables does, whatever else runs
// on the machine; and without Python's lock (ctypes gives it up), as an ioctl does.

#include <stdint.h>
#include <time.h>

// Nanoseconds of CPU that the calling thread has used.
uint64_t source_used(void) {
    struct timespec used;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

// Works until it has used so much.
void source_work_until(uint64_t nanoseconds) {
    while (source_used() < nanoseconds) {
    }
}
