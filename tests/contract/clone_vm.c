// A VM's calls in a process that shares its creator's memory (CLONE_VM), in the creator, and in a forked child.
// Prints what each call returned, errno negative. test_address_space.py says what that has to be.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SIZE = 1 << 20, STACK = 1 << 18 };

static int vm;
static unsigned char key;
static int answers[4];

static int set(unsigned char value)
{
	struct kvm_s390_skeys skeys = {
		.start_gfn = 0, .count = 1, .skeydata_addr = (unsigned long)&key
	};

	key = value;
	return ioctl(vm, KVM_S390_SET_SKEYS, &skeys) < 0 ? -errno : 0;
}

static int get(void)
{
	struct kvm_s390_skeys skeys = {
		.start_gfn = 0, .count = 1, .skeydata_addr = (unsigned long)&key
	};
	int returned;

	key = 0xef;
	returned = ioctl(vm, KVM_S390_GET_SKEYS, &skeys);
	return returned < 0 ? -errno : returned;
}

static int shares_memory(void *unused)
{
	(void)unused;
	answers[0] = get();
	answers[1] = set(0x30);
	answers[2] = set(0x30);
	answers[3] = get();
	return 0;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

int main(void)
{
	// Up to 6.19 a slot's memory begins at a megabyte, and mmap's wherever it likes.
	void *memory = mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {
		.slot = 0, .guest_phys_addr = 0, .memory_size = SIZE, .userspace_addr = ((unsigned long)memory + SIZE - 1) & -(unsigned long)SIZE
	};
	char *stack = malloc(STACK);
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), status;
	pid_t child;

	if (memory == MAP_FAILED || !stack)
		fail("memory");
	if (kvm < 0)
		fail("/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0UL);
	if (vm < 0)
		fail("KVM_CREATE_VM");
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		fail("KVM_SET_USER_MEMORY_REGION");

	child = clone(shares_memory, stack + STACK, CLONE_VM | CLONE_FILES | SIGCHLD, NULL);
	if (child < 0 || waitpid(child, &status, 0) != child || status)
		fail("clone");
	printf("CLONE_VM: get %d, set %d, set %d, get %d key %02x\n", answers[0], answers[1], answers[2], answers[3], key);
	status = get();
	printf("creator: get %d key %02x\n", status, key);
	fflush(stdout);

	child = fork();
	if (child == 0) {
		printf("fork: get %d\n", get());
		fflush(stdout);
		_exit(0);
	}
	if (child < 0 || waitpid(child, &status, 0) != child || status)
		fail("fork");
	return 0;
}
