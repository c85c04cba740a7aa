// Copies bytes through a stream socket, from one process to another, and says how long it took: what no server can beat.
//
//   copy unix|tcp BYTES BLOCK
//
// Writes {"seconds": S} on standard output. Both sides use one block of memory over and over.

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void make_pair(const char *kind, int ends[2]) {
    if (!strcmp(kind, "unix")) {
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends)) fail("socketpair");
        return;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&address, &length))
        fail("listen");
    ends[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (ends[0] < 0 || connect(ends[0], (struct sockaddr *)&address, length)) fail("connect");
    ends[1] = accept(listener, NULL, NULL);
    if (ends[1] < 0) fail("accept");
    close(listener);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: copy unix|tcp BYTES BLOCK\n");
        return 2;
    }
    size_t bytes = strtoull(argv[2], NULL, 10), block = strtoull(argv[3], NULL, 10);
    int ends[2];
    make_pair(argv[1], ends);
    char *memory = malloc(block);
    if (!memory) fail("malloc");
    memset(memory, 0x10, block);
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (!child) {
        close(ends[1]);
        for (size_t sent = 0; sent < bytes;) {
            size_t here = bytes - sent < block ? bytes - sent : block;
            ssize_t done = send(ends[0], memory, here, MSG_NOSIGNAL);
            if (done <= 0) fail("send");
            sent += (size_t)done;
        }
        _exit(0);
    }
    close(ends[0]);
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    size_t got = 0;
    for (;;) {
        ssize_t done = recv(ends[1], memory, block, 0);
        if (done < 0) fail("recv");
        if (!done) break;
        got += (size_t)done;
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    int status;
    if (waitpid(child, &status, 0) != child || status || got != bytes) {
        fprintf(stderr, "copy: %zu bytes came of %zu\n", got, bytes);
        return 1;
    }
    printf("{\"seconds\": %.9f}\n",
           (double)(ended.tv_sec - begun.tv_sec) + (double)(ended.tv_nsec - begun.tv_nsec) / 1e9);
    return 0;
}
