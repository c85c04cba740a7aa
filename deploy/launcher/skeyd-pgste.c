/*
 * skeyd-pgste PROGRAM [ARGUMENT...]: becomes PROGRAM, with PGSTE page tables.
 *
 * Up to Linux 6.19 only a process with PGSTE page tables can create a VM on s390x. A program whose ELF file has the
 * segment PT_S390_PGSTE gets them when it is exec'ed, and what it execs inherits them. The linker's option --s390-pgste
 * makes that segment, and is all there is to this program: it needs no privilege and changes nothing else.
 *
 * Exit status, as env(1) has it: 125 for a wrong command line, 126 where PROGRAM can't be run, 127 where it isn't there;
 * otherwise PROGRAM's own.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc < 2) {
		fputs("usage: skeyd-pgste PROGRAM [ARGUMENT...]\n", stderr);
		return 125;
	}
	execvp(argv[1], argv + 1);
	int error = errno; /* fprintf may change it */
	fprintf(stderr, "skeyd-pgste: can't run %s: %s\n", argv[1], strerror(error));
	return error == ENOENT ? 127 : 126;
}
