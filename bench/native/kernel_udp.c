/* Receives through the kernel's UDP and counts: kernel_udp ADDRESS PORT COUNT
 *
 * recvmmsg of up to 64 datagrams, a large receive buffer; sleeps for a millisecond when there is no full batch,
 * so that datagrams gather and a system call takes many. Ends after COUNT, or when none has come for half a second.
 *
 * Prints "ready"; at the end datagrams, bytes of their IP packets, the sum of the payloads' first words, nanoseconds
 * of CPU time.
 */
#include "counted.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { BATCH = 64, ROOM = 2048, HEADERS = 28, BUFFER = 1 << 26, PATIENCE = 500 };

static struct mmsghdr messages[BATCH];
static struct iovec vectors[BATCH];
static char rooms[BATCH][ROOM];

static int open_receiver(const char *address, int port)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), size = BUFFER;
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (fd < 0 || inet_pton(AF_INET, address, &where.sin_addr) != 1
        || setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size)
        || bind(fd, (struct sockaddr *)&where, sizeof where))
        fail("socket");
    for (int i = 0; i < BATCH; i++) {
        vectors[i] = (struct iovec){rooms[i], ROOM};
        messages[i].msg_hdr.msg_iov = &vectors[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    return fd;
}

static void count_batch(int got, struct tally *tally)
{
    for (int i = 0; i < got; i++) {
        uint64_t number;
        memcpy(&number, rooms[i], sizeof number);
        tally->frames++;
        tally->bytes += messages[i].msg_len + HEADERS;
        tally->sum += (int64_t)number;
    }
}

static void receive_all(int fd, int64_t count, struct tally *tally)
{
    const struct timespec nap = {0, 1000000};
    for (int idle = 0; tally->frames < count && idle < (tally->frames ? PATIENCE : 20 * PATIENCE);) {
        int got = recvmmsg(fd, messages, BATCH, 0, NULL);
        if (got < 0 && errno != EAGAIN)
            fail("recvmmsg");
        if (got > 0)
            count_batch(got, tally);
        idle = got > 0 ? 0 : idle + 1;
        if (got < BATCH)
            nanosleep(&nap, NULL);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    int fd = open_receiver(argv[1], atoi(argv[2]));
    struct tally tally = {0};
    say_ready();
    int64_t begun = clock_now(CLOCK_PROCESS_CPUTIME_ID);
    receive_all(fd, atoll(argv[3]), &tally);
    say_result(&tally, begun, 0);
    return 0;
}
