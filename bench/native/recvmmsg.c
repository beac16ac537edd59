/* Receives datagrams with recvmmsg, 64 at a time, and looks at the length and at one byte of each.
 *
 *     recvmmsg FD WARM_UP PACKETS REPEATS
 *
 * FD is a UDP socket that was inherited; SIGALRM ends the program if nothing comes. Prints for each repeat, one line
 * each: packets, seconds, the sum of their lengths, the sum of each one's fourth byte.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, ROOM = 2048, MARK = 3, PATIENCE = 60 };

struct tally {
    uint64_t packets, octets, marks;
};

static unsigned char rooms[BATCH][ROOM];
static struct sockaddr_storage peers[BATCH];
static struct iovec pieces[BATCH];
static struct mmsghdr messages[BATCH];

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec time;

    if (clock_gettime(CLOCK_MONOTONIC, &time) != 0)
        fail("clock_gettime");
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void prepare(void)
{
    for (int i = 0; i < BATCH; i++) {
        pieces[i] = (struct iovec){rooms[i], ROOM};
        messages[i].msg_hdr = (struct msghdr){
            .msg_name = &peers[i], .msg_namelen = sizeof peers[i], .msg_iov = &pieces[i], .msg_iovlen = 1};
    }
}

/* The kernel has written to msg_namelen: it has to be set again for the next call. */
static void look(struct tally *tally, int count)
{
    for (int i = 0; i < count; i++) {
        tally->octets += messages[i].msg_len;
        tally->marks += rooms[i][MARK];
        messages[i].msg_hdr.msg_namelen = sizeof peers[i];
    }
    tally->packets += (uint64_t)count;
}

static struct tally receive(int fd, uint64_t packets)
{
    struct tally tally = {0, 0, 0};

    while (tally.packets < packets) {
        int count = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);

        if (count < 0 && errno != EINTR)
            fail("recvmmsg");
        if (count > 0)
            look(&tally, count);
    }
    return tally;
}

static void repeat(int fd, uint64_t packets)
{
    double start = now();
    struct tally tally = receive(fd, packets);
    double seconds = now() - start;
    printf("%llu %.9f %llu %llu\n", (unsigned long long)tally.packets, seconds, (unsigned long long)tally.octets,
           (unsigned long long)tally.marks);
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: recvmmsg FD WARM_UP PACKETS REPEATS\n");
        return 2;
    }
    alarm(PATIENCE);
    prepare();
    int fd = atoi(argv[1]);
    receive(fd, strtoull(argv[2], NULL, 10));
    for (int i = 0; i < atoi(argv[4]); i++)
        repeat(fd, strtoull(argv[3], NULL, 10));
    return 0;
}
