// SPDX-License-Identifier: Apache-2.0
/*
 * Linux 4.19 to 6.19, s390: KVM_S390_SET_SKEYS answers 0 and loses keys.
 *
 * Where the host has no page table yet for a MiB of a guest's memory, the first
 * key other than zero that is set there is lost. lost-keys.md says why.
 *
 * Build and run on s390x, with access to /dev/kvm; no guest is run:
 *
 *	gcc -O2 -Wl,--s390-pgste -o lost-keys lost-keys.c && ./lost-keys
 *
 * It ends with 0 if no key was lost, 1 if keys were lost, 4 if this can't be
 * tested here, as kselftest has it; with 2 if a call failed that should not.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>
#include <linux/kvm.h>

#define FRAME		4096UL
#define SEGMENT		(1UL << 20)	/* what one page table covers */
#define SEGMENTS	8UL
#define PER_SEGMENT	(SEGMENT / FRAME)
#define FRAMES		(SEGMENTS * PER_SEGMENT)
#define MEMORY		(SEGMENTS * SEGMENT)

/* Access control and fetch protection. Up to 6.19 R and C change by themselves. */
#define ACC_F		0xf8

enum { NONE_LOST = 0, LOST = 1, ERROR = 2, SKIP = 4 };

static int kvm, vm;
static uint8_t *memory;
static uint8_t want[FRAMES];
static unsigned long total;

static void skip(const char *why)
{
	printf("skipped: %s: %s\n", why, strerror(errno));
	exit(SKIP);
}

/* A new VM whose memory nobody has touched. */
static void new_guest(const char *title)
{
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY };

	/* What was there stays mapped, so that its page tables are not found again. */
	memory = mmap(NULL, MEMORY + SEGMENT, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		err(ERROR, "mmap");
	memory += -(uintptr_t)memory & (SEGMENT - 1);
	region.userspace_addr = (uintptr_t)memory;

	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		skip("KVM_CREATE_VM (EINVAL: link with -Wl,--s390-pgste)");
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		err(ERROR, "KVM_SET_USER_MEMORY_REGION");
	memset(want, 0, sizeof(want));
	printf("\n%s\n", title);
}

static void set(unsigned long first, unsigned long count)
{
	struct kvm_s390_skeys args = {
		.start_gfn = first,
		.count = count,
		.skeydata_addr = (uintptr_t)(want + first),
	};
	int ret = ioctl(vm, KVM_S390_SET_SKEYS, &args);

	if (ret)
		err(ERROR, "KVM_S390_SET_SKEYS: %d", ret);
}

/* Compare the guest's keys with those that were set. */
static void check(const char *what)
{
	uint8_t got[FRAMES];
	struct kvm_s390_skeys args = {
		.count = FRAMES,
		.skeydata_addr = (uintptr_t)got,
	};
	unsigned long i, keys = 0, lost = 0;
	int ret = ioctl(vm, KVM_S390_GET_SKEYS, &args);

	if (ret)
		err(ERROR, "KVM_S390_GET_SKEYS: %d", ret);
	for (i = 0; i < FRAMES; i++) {
		keys += want[i] != 0;
		if ((got[i] & ACC_F) == (want[i] & ACC_F))
			continue;
		if (got[i] & ACC_F)
			errx(ERROR, "frame %lu: set %#x, got %#x", i, want[i], got[i]);
		lost++;
	}
	printf("  %s: %lu of %lu lost", what, lost, keys);
	for (i = 0; lost && i < FRAMES; i++)
		if ((got[i] & ACC_F) != (want[i] & ACC_F))
			printf(" %lu", i);
	printf("\n");
	total += lost;
}

/* A key that is not zero for each frame from the nth of each MiB on, zero for those before. */
static void want_from(unsigned long nth)
{
	unsigned long i;

	for (i = 0; i < FRAMES; i++)
		want[i] = i % PER_SEGMENT < nth ? 0 : (i % 15 + 1) << 4;
}

/* Give each MiB a page table by touching one frame of it, the last. */
static void touch(void)
{
	unsigned long i;

	for (i = 1; i <= SEGMENTS; i++)
		memory[i * SEGMENT - 1] = 1;
}

int main(void)
{
	struct utsname host;
	unsigned long i;

	uname(&host);
	printf("Linux %s %s, %s\n", host.release, host.version, host.machine);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		skip("/dev/kvm");
	errno = ENOTSUP;
	if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_S390_SKEYS) != 1)
		skip("KVM_CAP_S390_SKEYS");
	printf("%lu MiB a guest, %lu frames, %lu to the MiB; the numbers behind \"lost\" are frames\n",
	       SEGMENTS, FRAMES, PER_SEGMENT);

	new_guest("untouched memory, no key is zero");
	want_from(0);
	set(0, FRAMES);
	check("SET");
	set(0, FRAMES);
	check("the same SET again");

	new_guest("untouched memory, the first 5 keys of each MiB are zero");
	want_from(5);
	set(0, FRAMES);
	check("SET");

	new_guest("untouched memory, first all keys are zero, then none is");
	set(0, FRAMES);
	check("SET of zeros");
	want_from(0);
	set(0, FRAMES);
	check("SET");

	new_guest("untouched memory, one key for each MiB, each in a SET of its own");
	for (i = 100; i < FRAMES; i += PER_SEGMENT) {
		want[i] = 0x30;
		set(i, 1);
	}
	check("8 SETs");

	new_guest("the last frame of each MiB touched, no key is zero");
	touch();
	want_from(0);
	set(0, FRAMES);
	check("SET");

	new_guest("the last frame of each MiB touched, then given back (MADV_DONTNEED)");
	touch();
	if (madvise(memory, MEMORY, MADV_DONTNEED))
		err(ERROR, "madvise");
	want_from(0);
	set(0, FRAMES);
	check("SET");

	printf("\n%s\n", total ? "keys were lost, and every SET answered 0" : "no key was lost");
	return total ? LOST : NONE_LOST;
}
