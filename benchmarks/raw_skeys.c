// SPDX-License-Identifier: Apache-2.0
/*
 * The raw ioctls in a loop, timed: what skeyd is compared with.
 *
 *	raw_skeys MIB SLICE untouched|mapped|touched
 *
 * makes a VM with one slot of anonymous memory, MIB large, and for each line
 * on standard input, "get" or "set", gets or sets the keys of all its frames in
 * calls of SLICE keys, and prints how many nanoseconds that took. Nothing is
 * verified, as no other user of the calls does it.
 *
 * The memory is as nobody ever touched it; or one frame in each MiB was
 * written, so that there are page tables; or all frames were. "touched" and
 * "mapped" also set all keys once, before the first line is read.
 *
 * Link with -Wl,--s390-pgste. Ends with 1 if anything fails.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <linux/kvm.h>

#define FRAME	4096UL
#define SEGMENT	(1UL << 20)	/* what one page table covers */

static int vm;
static uint8_t *keys;
static unsigned long frames, slice;

static unsigned long number(const char *text)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (*end || !value)
		errx(1, "%s is no number above 0", text);
	return value;
}

static void new_guest(unsigned long size, unsigned long step)
{
	struct kvm_userspace_memory_region region = { .memory_size = size };
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	uint8_t *memory = mmap(NULL, size + SEGMENT, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (kvm < 0)
		err(1, "/dev/kvm");
	if (memory == MAP_FAILED)
		err(1, "mmap");
	memory += -(uintptr_t)memory & (SEGMENT - 1);
	region.userspace_addr = (uintptr_t)memory;
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		err(1, "KVM_CREATE_VM");
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		err(1, "KVM_SET_USER_MEMORY_REGION");
	for (unsigned long at = 0; step && at < size; at += step)
		memory[at] = 1;
}

static void call(unsigned long request)
{
	for (unsigned long at = 0; at < frames; at += slice) {
		struct kvm_s390_skeys args = {
			.start_gfn = at,
			.count = frames - at < slice ? frames - at : slice,
			.skeydata_addr = (uintptr_t)(keys + at),
		};

		if (ioctl(vm, request, &args))
			err(1, "the keys at gfn %lu", at);
	}
}

/* As the benchmark has them: ACC 1 to 15, over and over. */
static void fill(void)
{
	for (unsigned long at = 0; at < frames; at++)
		keys[at] = 0x10 + at % 15 * 0x10;
}

int main(int argc, char **argv)
{
	char line[16];
	int untouched, mapped;

	if (argc != 4)
		errx(1, "raw_skeys MIB SLICE untouched|mapped|touched");
	frames = number(argv[1]) * (SEGMENT / FRAME);
	slice = number(argv[2]);
	untouched = !strcmp(argv[3], "untouched");
	mapped = !strcmp(argv[3], "mapped");
	if (!untouched && !mapped && strcmp(argv[3], "touched"))
		errx(1, "%s is no state of memory", argv[3]);
	keys = malloc(frames);
	if (!keys)
		err(1, "malloc");
	fill();
	new_guest(frames * FRAME, untouched ? 0 : mapped ? SEGMENT : FRAME);
	if (!untouched)
		call(KVM_S390_SET_SKEYS);
	while (fgets(line, sizeof(line), stdin)) {
		struct timespec begun, ended;
		unsigned long request;

		if (!strcmp(line, "get\n"))
			request = KVM_S390_GET_SKEYS;
		else if (!strcmp(line, "set\n"))
			request = KVM_S390_SET_SKEYS;
		else
			errx(1, "\"get\" or \"set\" is what it does");
		/* What a GET read, R and C included, is not what is set. */
		fill();
		clock_gettime(CLOCK_MONOTONIC, &begun);
		call(request);
		clock_gettime(CLOCK_MONOTONIC, &ended);
		printf("%lld\n", (ended.tv_sec - begun.tv_sec) * 1000000000LL +
				 ended.tv_nsec - begun.tv_nsec);
		fflush(stdout);
	}
	return 0;
}
