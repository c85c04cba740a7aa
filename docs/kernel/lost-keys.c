// SPDX-License-Identifier: Apache-2.0
/*
 * Linux 4.19 to 6.19, s390: KVM_S390_SET_SKEYS answers 0 and loses keys.
 *
 * Where the host has no page table yet for a MiB of a guest's memory, the first
 * key other than zero that is set there is lost: kvm_s390_set_skeys() faults
 * the page in, and doesn't set the key again.
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
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>

#define FRAME		4096UL
#define SEGMENT		(1UL << 20)	/* what one page table covers */
#define SEGMENTS	8UL
#define PER_SEGMENT	(SEGMENT / FRAME)
#define FRAMES		(SEGMENTS * PER_SEGMENT)
#define MEMORY		(SEGMENTS * SEGMENT)

/* Access control, fetch protection. Up to 6.19 R and C change by themselves. */
#define ACC_F		0xf8

enum { NONE_LOST = 0, LOST = 1, ERROR = 2, SKIP = 4 };

static int kvm, vm;
static uint8_t *memory;
static uint8_t want[FRAMES];
static unsigned long total;
static volatile unsigned long *served;

static void skip(const char *why)
{
	printf("skipped: %s: %s\n", why, strerror(errno));
	exit(SKIP);
}

/* A new VM whose memory nobody has touched. */
static void new_guest(const char *title)
{
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY };

	/* What was there stays mapped: its page tables are not found again. */
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
			errx(ERROR, "frame %lu: set %#x, got %#x",
			     i, want[i], got[i]);
		lost++;
	}
	printf("  %s: %lu of %lu lost", what, lost, keys);
	for (i = 0; lost && i < FRAMES; i++)
		if ((got[i] & ACC_F) != (want[i] & ACC_F))
			printf(" %lu", i);
	printf("\n");
	total += lost;
}

/* From the nth frame of each MiB on a key that is not zero, before it zero. */
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

/* Give each frame that is missed a page of zeros. Never returns. */
static void serve(int fd)
{
	static uint8_t zeros[FRAME] __attribute__((aligned(4096)));
	struct uffd_msg msg;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (read(fd, &msg, sizeof(msg)) == sizeof(msg)) {
		struct uffdio_copy copy = {
			.dst = msg.arg.pagefault.address & -FRAME,
			.src = (uintptr_t)zeros,
			.len = FRAME,
		};

		if (msg.event != UFFD_EVENT_PAGEFAULT)
			continue;
		++*served;
		if (ioctl(fd, UFFDIO_COPY, &copy) && errno != EEXIST)
			break;
	}
	_exit(ERROR);
}

/*
 * Have a process of its own serve the guest's page faults, as postcopy does.
 * fixup_user_fault() then drops the mmap lock. Returns its pid, or 0 where
 * there is no userfaultfd for this user.
 */
static pid_t serve_faults(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register missing = {
		.range = { .start = (uintptr_t)memory, .len = MEMORY },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	pid_t pid;

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) {
		printf("  skipped: userfaultfd: %s\n", strerror(errno));
		return 0;
	}
	if (ioctl(fd, UFFDIO_REGISTER, &missing))
		err(ERROR, "UFFDIO_REGISTER");
	served = mmap(NULL, FRAME, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (served == MAP_FAILED)
		err(ERROR, "mmap");
	fflush(stdout);
	pid = fork();
	if (pid < 0)
		err(ERROR, "fork");
	if (!pid)
		serve(fd);
	close(fd);
	return pid;
}

int main(void)
{
	struct utsname host;
	unsigned long i;
	pid_t server;

	uname(&host);
	printf("Linux %s %s\n", host.release, host.version);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		skip("/dev/kvm");
	errno = ENOTSUP;
	if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_S390_SKEYS) != 1)
		skip("KVM_CAP_S390_SKEYS");
	printf("%lu MiB a guest, %lu frames, %lu a MiB; after lost: which\n",
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

	new_guest("untouched memory, one key for each MiB, by one SET each");
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

	new_guest("the last frame of each MiB touched, then MADV_DONTNEED");
	touch();
	if (madvise(memory, MEMORY, MADV_DONTNEED))
		err(ERROR, "madvise");
	want_from(0);
	set(0, FRAMES);
	check("SET");

	new_guest("untouched memory, served by userfaultfd, no key is zero");
	want_from(0);
	server = serve_faults();
	if (server > 0) {
		set(0, FRAMES);
		check("SET");
		kill(server, SIGKILL);
		waitpid(server, NULL, 0);
		printf("  %lu faults were served\n", *served);
	}

	printf("\n%s\n", total ? "keys were lost, and every SET answered 0" :
			       "no key was lost");
	return total ? LOST : NONE_LOST;
}
