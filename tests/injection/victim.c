/*
 * A program for calls to be injected into. Its first thread does what the first argument says, and tells of it when that
 * is over; a second one answers: "ping" with "pong SIGNALS", where SIGNALS is how often SIGUSR1 came, "wake" by ending
 * what the first waits for, "counters" with where they lie. "ready" is printed before the first thread begins.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/rseq.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#ifdef __s390x__
#include <sys/auxv.h>
#endif
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t signals;
static int channel[2];
static uint32_t word;
static int milliseconds;
static volatile long total;
volatile uint64_t flag;

/* What each thread of the mode "threads" has done, what those did that it makes, the first thread, and its signals. */
#define WORKERS 24
enum { MADE = WORKERS, FIRST, SIGNALS, COUNTERS };
static volatile uint64_t counters[COUNTERS];

static void count(int number)
{
	(void)number;
	signals++;
	counters[SIGNALS]++;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void *answer(void *unused)
{
	char line[64];

	while (fgets(line, sizeof line, stdin)) {
		if (!strcmp(line, "ping\n")) {
			printf("pong %d\n", (int)signals);
			fflush(stdout);
		} else if (!strcmp(line, "wake\n")) {
			flag = 1;
			__atomic_store_n(&word, 1, __ATOMIC_SEQ_CST);
			syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0);
			if (write(channel[1], "woken", 5) != 5)
				abort();
		} else if (!strcmp(line, "total\n")) {
			printf("total %ld\n", total);
			fflush(stdout);
		} else if (!strcmp(line, "counters\n")) {
			printf("counters %lu %d\n", (unsigned long)counters, COUNTERS);
			fflush(stdout);
		}
	}
	exit(0);
	return unused;
}

static long wait_in_read(void)
{
	char got[16];

	return read(channel[0], got, sizeof got);
}

static void read_in_handler(int number)
{
	long got = wait_in_read();

	(void)number;
	printf("handler %ld\n", got);
	fflush(stdout);
}

static void spin_in_handler(int number)
{
	(void)number;
	while (!flag)
		;
}

static int in_handler(void (*handler)(int), int flags, size_t size)
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
	char *area = mmap(NULL, size + 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	stack_t stack = {.ss_sp = area + 4096, .ss_size = size};

	memset(area, 0x5a, size + 8192);
	if (flags & SA_ONSTACK && sigaltstack(&stack, NULL))
		return -1;
	sigaction(SIGUSR2, &action, NULL);
	raise(SIGUSR2);
	for (size_t at = 0; at < 4096; at++)
		if (area[at] != 0x5a || area[4096 + size + at] != 0x5a)
			return -2;
	return 0;
}

/* Have the kernel answer each ioctl so. */
static int forbid(uint32_t action)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};

	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/* Calls of all kinds, each of which must give what it gives alone. */
static void loop(void)
{
	for (;;) {
		struct timespec short_time = {0, 200000};
		double begin = now(), sum = 0;
		char got[8];
		int seen = signals, result = ppoll(NULL, 0, &short_time, NULL);

		if (result ? errno != EINTR || signals == seen : now() - begin < 0.0002)
			abort();
		seen = signals;
		result = clock_nanosleep(CLOCK_MONOTONIC, 0, &short_time, NULL);
#ifdef __s390x__
		/* Where a tracer was killed: see docs/injection.md. */
		if (result && result != EINTR)
			abort();
#else
		if (result && (result != EINTR || signals == seen))
			abort();
#endif
		if (write(channel[1], "abcd", 4) != 4 || read(channel[0], got, 8) != 4 || memcmp(got, "abcd", 4))
			abort();
		for (int number = 1; number < 2000; number++)
			sum += 1.0 / number;
		if (sum < 8.177 || sum > 8.179)
			abort();
		if (syscall(SYS_futex, &word, FUTEX_WAIT, 1, &short_time, NULL, 0) != -1 || errno != EAGAIN)
			abort();
		total++;
		counters[FIRST]++;
	}
}

/* Computes, calls and waits, and aborts where a result is wrong. */
static void *work(void *own)
{
	volatile uint64_t *counter = own;
	int ends[2];

	if (pipe(ends))
		abort();
	for (;;) {
		struct timespec short_time = {0, 50000};
		uint64_t before = *counter, sum = 0, got = 0;

		for (uint64_t number = 0; number < 1000; number++)
			sum += number ^ before;
		for (uint64_t number = 0; number < 1000; number++)
			sum -= number ^ before;
		if (sum || write(ends[1], &before, sizeof before) != sizeof before)
			abort();
		if (read(ends[0], &got, sizeof got) != sizeof got || got != *counter)
			abort();
		if (syscall(SYS_futex, &word, FUTEX_WAIT, 1, &short_time, NULL, 0) != -1 || errno != EAGAIN)
			abort();
		++*counter;
		if (before % 4 == 0)
			clock_nanosleep(CLOCK_MONOTONIC, 0, &short_time, NULL);
	}
	return NULL;
}

static void *work_once(void *number)
{
	counters[MADE]++;
	return number;
}

/* Makes threads, one after the other, that end at once. */
static void *make(void *unused)
{
	for (uint64_t number = 0;; number++) {
		pthread_t thread;
		void *result;

		if (pthread_create(&thread, NULL, work_once, (void *)number) || pthread_join(thread, &result))
			abort();
		if (result != (void *)number)
			abort();
	}
	return unused;
}

static void threads(void)
{
	pthread_t thread;
	sigset_t all, old;

	/* Signals are the first thread's. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	for (int at = 0; at < WORKERS; at++)
		if (pthread_create(&thread, NULL, work, (void *)&counters[at]))
			abort();
	if (pthread_create(&thread, NULL, make, NULL))
		abort();
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	loop();
}

#ifdef __x86_64__
#define BELOW 8192

/* What the registers are given, and what they are afterwards: rax rbx rdx rsi rdi rbp r8-r15, flags, rsp. */
uint64_t given[16], found[16];
uint8_t vectors_given[32][64] __attribute__((aligned(64))), vectors_found[32][64] __attribute__((aligned(64)));
uint64_t masks_given[8], masks_found[8];
uint8_t below[BELOW], scratch[256];
uint64_t kept_stack, level;
uint32_t mxcsr_given = 0x7f80, mxcsr_found;
uint16_t x87_given = 0x0f7f, x87_found;
void spin(void);

asm(".text\n"
    ".globl spin\n"
    "spin:\n"
    "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "mov %rsp, kept_stack(%rip)\n"
    "lea -8192(%rsp), %rdi; mov $8192, %ecx; mov $0x5a, %al; cld; rep stosb\n"
    "ldmxcsr mxcsr_given(%rip); fldcw x87_given(%rip); fldpi\n"
    "lea vectors_given(%rip), %rsi\n"
    "cmpq $2, level(%rip); jb 1f; ja 2f\n"
    ".set i, 0; .rept 16; .altmacro; .macro load_y n; vmovdqu 64*\\n(%rsi), %ymm\\n; .endm; load_y %i; .purgem load_y; .set i, i+1; .endr\n"
    "jmp 3f\n"
    "1: .set i, 0; .rept 16; .macro load_x n; movdqu 64*\\n(%rsi), %xmm\\n; .endm; load_x %i; .purgem load_x; .set i, i+1; .endr\n"
    "jmp 3f\n"
    "2: .set i, 0; .rept 32; .macro load_z n; vmovdqu64 64*\\n(%rsi), %zmm\\n; .endm; load_z %i; .purgem load_z; .set i, i+1; .endr\n"
    "lea masks_given(%rip), %rsi\n"
    ".set i, 1; .rept 7; .macro load_k n; kmovw 8*\\n(%rsi), %k\\n; .endm; load_k %i; .purgem load_k; .set i, i+1; .endr\n"
    "3: lea scratch+256(%rip), %rsp; pushq given+112(%rip); popfq; mov kept_stack(%rip), %rsp\n"
    "mov given(%rip), %rax; mov given+8(%rip), %rbx; mov given+16(%rip), %rdx; mov given+24(%rip), %rsi\n"
    "mov given+32(%rip), %rdi; mov given+40(%rip), %rbp; mov given+48(%rip), %r8; mov given+56(%rip), %r9\n"
    "mov given+64(%rip), %r10; mov given+72(%rip), %r11; mov given+80(%rip), %r12; mov given+88(%rip), %r13\n"
    "mov given+96(%rip), %r14; mov given+104(%rip), %r15\n"
    "4: mov flag(%rip), %rcx; jrcxz 4b\n"
    "mov %rax, found(%rip); mov %rbx, found+8(%rip); mov %rdx, found+16(%rip); mov %rsi, found+24(%rip)\n"
    "mov %rdi, found+32(%rip); mov %rbp, found+40(%rip); mov %r8, found+48(%rip); mov %r9, found+56(%rip)\n"
    "mov %r10, found+64(%rip); mov %r11, found+72(%rip); mov %r12, found+80(%rip); mov %r13, found+88(%rip)\n"
    "mov %r14, found+96(%rip); mov %r15, found+104(%rip); mov %rsp, found+120(%rip)\n"
    "lea scratch+256(%rip), %rsp; pushfq; popq found+112(%rip); mov kept_stack(%rip), %rsp; cld\n"
    "lea -8192(%rsp), %rsi; lea below(%rip), %rdi; mov $8192, %ecx; rep movsb\n"
    "stmxcsr mxcsr_found(%rip); fnstcw x87_found(%rip); fstp %st(0)\n"
    "lea vectors_found(%rip), %rsi\n"
    "cmpq $2, level(%rip); jb 5f; ja 6f\n"
    ".set i, 0; .rept 16; .macro store_y n; vmovdqu %ymm\\n, 64*\\n(%rsi); .endm; store_y %i; .purgem store_y; .set i, i+1; .endr\n"
    "vzeroupper; jmp 7f\n"
    "5: .set i, 0; .rept 16; .macro store_x n; movdqu %xmm\\n, 64*\\n(%rsi); .endm; store_x %i; .purgem store_x; .set i, i+1; .endr\n"
    "jmp 7f\n"
    "6: .set i, 0; .rept 32; .macro store_z n; vmovdqu64 %zmm\\n, 64*\\n(%rsi); .endm; store_z %i; .purgem store_z; .set i, i+1; .endr\n"
    "lea masks_found(%rip), %rsi\n"
    ".set i, 1; .rept 7; .macro store_k n; kmovw %k\\n, 8*\\n(%rsi); .endm; store_k %i; .purgem store_k; .set i, i+1; .endr\n"
    "vzeroupper\n"
    "7: pushq $0x1f80; ldmxcsr (%rsp); movw $0x37f, (%rsp); fldcw (%rsp); add $8, %rsp\n"
    ".noaltmacro\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
    "ret\n");

/*
 * A restartable sequence that never ends by itself. Whatever interrupts it makes the kernel go to its abort handler,
 * which counts; were the thread put back into it instead, the number that it has in a register would not be that count.
 */
static volatile uint64_t aborts, wrong;

static int sequence(void)
{
	/* struct rseq of glibc 2.35 and later lies there. */
	extern const ptrdiff_t __rseq_offset __attribute__((weak));
	struct rseq *own;

	if (!&__rseq_offset)
		return -2;
	own = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	asm volatile("1:\n"
		     "mov aborted(%%rip), %%rdx\n"
		     "lea 5f(%%rip), %%rax; mov %%rax, %0\n"
		     "2: cmp aborted(%%rip), %%rdx; jne 6f; cmpq $0, flag(%%rip); je 2b\n"
		     "3: jmp 7f\n"
		     ".long 0x53053053\n"
		     "4: incq aborted(%%rip); jmp 1b\n"
		     "6: incq misled(%%rip); jmp 1b\n"
		     ".pushsection .data; .balign 32\n"
		     "5: .long 0, 0; .quad 2b, 3b - 2b, 4b\n"
		     "aborted: .quad 0\n"
		     "misled: .quad 0\n"
		     ".popsection\n"
		     "7: movq $0, %0; mov aborted(%%rip), %%rax; mov %%rax, %1; mov misled(%%rip), %%rax; mov %%rax, %2\n"
		     : "=m"(own->rseq_cs), "=m"(aborts), "=m"(wrong)
		     :
		     : "rax", "rdx", "memory", "cc");
	return wrong ? -1 : (int)aborts;
}

static int registers(void)
{
	size_t width = 16;

	level = 1;
	if (__builtin_cpu_supports("avx"))
		level = 2, width = 32;
	if (__builtin_cpu_supports("avx512f"))
		level = 3, width = 64;
	for (int at = 0; at < 14; at++)
		given[at] = 0x1111111111111111u * (at + 1) ^ 0x8000000000000000u >> at;
	given[14] = 0xed7; /* carry, parity, adjust, zero, sign, interrupts, direction, overflow */
	for (int at = 0; at < 32; at++)
		for (int byte = 0; byte < 64; byte++)
			vectors_given[at][byte] = at * 7 + byte * 3 + 1;
	for (int at = 1; at < 8; at++)
		masks_given[at] = 0x1234 + at;
	spin();
	given[15] = kept_stack;
	for (int at = 0; at < 16; at++)
		if (given[at] != found[at])
			return 1 + at;
	for (int at = 0; at < (level == 3 ? 32 : 16); at++)
		if (memcmp(vectors_given[at], vectors_found[at], width))
			return 100 + at;
	if (level == 3 && memcmp(masks_given + 1, masks_found + 1, 7 * sizeof *masks_found))
		return 200;
	for (int at = 0; at < BELOW; at++)
		if (below[at] != 0x5a)
			return 1000 + BELOW - at;
	return mxcsr_given != mxcsr_found ? 300 : x87_given != x87_found ? 301 : 0;
}
#endif

#ifdef __s390x__
static uint8_t vectors_given[512] __attribute__((aligned(8))), vectors_found[512] __attribute__((aligned(8)));

/* 32 vector registers, of which the first 16 have those for floating point in them, and some general ones. */
static int registers(void)
{
	uint64_t general[5] = {0x1111, 0x2222222222222222, 0x3333, 0x8000000000000004, 0x5555};

	if (!(getauxval(AT_HWCAP) & HWCAP_S390_VXRS))
		return -2;
	for (size_t at = 0; at < sizeof vectors_given; at++)
		vectors_given[at] = at * 7 + 1;
	asm volatile(".machine push; .machine z13\n"
		     "lmg %%r6,%%r10,0(%[general])\n"
		     "vlm %%v0,%%v15,0(%[given]); vlm %%v16,%%v31,256(%[given])\n"
		     "0: cli 7(%[flag]),0; je 0b\n"
		     "vstm %%v0,%%v15,0(%[found]); vstm %%v16,%%v31,256(%[found])\n"
		     "stmg %%r6,%%r10,0(%[general])\n"
		     ".machine pop"
		     :
		     : [given] "a"(vectors_given), [found] "a"(vectors_found), [flag] "a"(&flag), [general] "a"(general)
		     : "memory", "cc", "r6", "r7", "r8", "r9", "r10", "f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8",
		       "f9", "f10", "f11", "f12", "f13", "f14", "f15");
	if (memcmp(vectors_given, vectors_found, sizeof vectors_given))
		return 1;
	return general[0] != 0x1111 || general[3] != 0x8000000000000004 || general[4] != 0x5555;
}
#endif

/* Until the child has ended the parent waits, and nothing but a kill ends that. */
static long in_vfork(void)
{
	pid_t child = vfork();
	int status;

	if (!child) {
		usleep(milliseconds * 1000);
		_exit(7);
	}
	while (waitpid(child, &status, 0) < 0)
		;
	return WEXITSTATUS(status);
}

int main(int count_of, char **words)
{
	const char *what = count_of > 1 ? words[1] : "read";
	struct sigaction counting = {.sa_handler = count};
	struct timespec time, left = {-1, -1};
	struct pollfd polled;
	sigset_t all, old;
	pthread_t thread;
	double begin;
	long result;

	milliseconds = count_of > 2 ? atoi(words[2]) : 0;
	time.tv_sec = milliseconds / 1000;
	time.tv_nsec = milliseconds % 1000 * 1000000;
	for (int at = 3; at < count_of; at++)
		if (open(words[at], O_RDWR | O_CLOEXEC) < 0)
			return 1;
	if (pipe(channel))
		return 1;
	sigaction(SIGUSR1, &counting, NULL);
	/* Signals are the first thread's. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	pthread_create(&thread, NULL, answer, NULL);
	if (!strcmp(what, "ppoll-mask"))
		sigdelset(&all, SIGUSR1); /* which is blocked but in the call */
	else
		pthread_sigmask(SIG_SETMASK, &old, NULL);
	printf("ready\n");
	fflush(stdout);
	polled = (struct pollfd){.fd = channel[0], .events = POLLIN};
	begin = now();
	errno = 0;
	if (!strcmp(what, "ppoll"))
		result = ppoll(&polled, 1, milliseconds ? &time : NULL, NULL);
	else if (!strcmp(what, "ppoll-mask"))
		result = ppoll(&polled, 1, milliseconds ? &time : NULL, &all);
	else if (!strcmp(what, "poll"))
		result = poll(&polled, 1, milliseconds);
	else if (!strcmp(what, "nanosleep"))
		result = nanosleep(&time, &left);
	else if (!strcmp(what, "futex"))
		result = syscall(SYS_futex, &word, FUTEX_WAIT, 0, milliseconds ? &time : NULL, NULL, 0);
	else if (!strcmp(what, "read"))
		result = wait_in_read();
	else if (!strcmp(what, "vfork"))
		result = in_vfork();
	else if (!strcmp(what, "pause"))
		result = pause();
	else if (!strcmp(what, "handler"))
		result = in_handler(read_in_handler, 0, 16384);
	else if (!strcmp(what, "alternate"))
		result = in_handler(read_in_handler, SA_ONSTACK, 16384);
	else if (!strcmp(what, "spin-handler"))
		result = in_handler(spin_in_handler, SA_ONSTACK, 16384);
	else if (!strcmp(what, "forbidden-eperm"))
		result = forbid(SECCOMP_RET_ERRNO | EPERM) ? -1 : wait_in_read();
	else if (!strcmp(what, "forbidden-enosys"))
		result = forbid(SECCOMP_RET_ERRNO | ENOSYS) ? -1 : wait_in_read();
	else if (!strcmp(what, "forbidden-trap"))
		result = forbid(SECCOMP_RET_TRAP) ? -1 : wait_in_read();
#ifdef __x86_64__
	else if (!strcmp(what, "sequence"))
		result = sequence();
#endif
	else if (!strcmp(what, "loop"))
		loop(), result = 0;
	else if (!strcmp(what, "threads"))
		threads(), result = 0;
#if defined __x86_64__ || defined __s390x__
	else if (!strcmp(what, "registers"))
		result = registers();
#endif
	else
		return 2;
	printf("result %ld %d %.4f %d\n", result, result < 0 ? errno : 0, now() - begin, (int)signals);
	fflush(stdout);
	pthread_join(thread, NULL);
	return 0;
}
