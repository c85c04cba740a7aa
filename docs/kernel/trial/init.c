// SPDX-License-Identifier: Apache-2.0
/* The first process of the trial: runs the two programs and switches off. */
#define _GNU_SOURCE
#include <err.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>

static void run(const char *path)
{
	pid_t pid;
	int status;

	fflush(stdout);
	pid = fork();
	if (pid < 0)
		err(2, "fork");
	if (!pid) {
		execl(path, path, (char *)NULL);
		err(127, "%s", path);
	}
	waitpid(pid, &status, 0);
	printf("%s ended with %d\n", path, WEXITSTATUS(status));
}

int main(void)
{
	if (mount("devtmpfs", "/dev", "devtmpfs", 0, ""))
		err(2, "mount");
	run("/lost-keys");
	run("/no-key");
	fflush(stdout);
	reboot(RB_POWER_OFF);
	err(2, "reboot");
}
