// SPDX-License-Identifier: Apache-2.0
/*
 * SET and GET of a key that can't be set: emulated.diff has pmd_lookup() answer
 * -EFAULT for the GiB at ADDRESS, as it does for a page of 2 GiB.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/kvm.h>

#define ADDRESS	0x30000000000UL
#define MEMORY	(1UL << 20)

static void ask(int vm, const char *what, unsigned long request)
{
	uint8_t key = 0x30;
	struct kvm_s390_skeys args = {
		.count = 1,
		.skeydata_addr = (uintptr_t)&key,
	};
	int ret;

	/* Before the call: it may not come back. */
	printf("%s ...\n", what);
	fflush(stdout);
	ret = ioctl(vm, request, &args);
	printf("%s answers %d%s%s\n", what, ret, ret < 0 ? ": " : "",
	       ret < 0 ? strerror(errno) : "");
	fflush(stdout);
}

int main(void)
{
	struct kvm_userspace_memory_region region = {
		.memory_size = MEMORY,
		.userspace_addr = ADDRESS,
	};
	int kvm, vm;

	if (mmap((void *)ADDRESS, MEMORY, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
		 -1, 0) == MAP_FAILED)
		err(2, "mmap");
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(2, "/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		err(2, "KVM_CREATE_VM");
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		err(2, "KVM_SET_USER_MEMORY_REGION");
	ask(vm, "SET", KVM_S390_SET_SKEYS);
	ask(vm, "GET", KVM_S390_GET_SKEYS);
	return 0;
}
