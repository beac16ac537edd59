/* Sends frames on an interface, so many a second: paced_sender DEVICE FRAME_BYTES RATE COUNT < frames
 *
 * Standard input holds frames of FRAME_BYTES each; they are sent round and round until COUNT have gone. Batches of
 * up to 32 with sendmmsg, past the queueing discipline; RATE 0: as fast as the kernel takes them. A frame that the
 * interface has no room for is not sent again.
 *
 * Prints: frames sent, frames refused, the sum of the refused ones' places among the frames, nanoseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 32, MOST = 4096 };

static struct mmsghdr messages[MOST + BATCH];
static struct iovec vectors[MOST + BATCH];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Reads the frames; the first BATCH stand behind the last once more, so that no batch has to be cut. */
static int read_frames(size_t size)
{
    char *frames = malloc(MOST * size);
    size_t count = frames ? fread(frames, size, MOST, stdin) : 0;
    if (count == 0)
        fail("frames");
    for (size_t i = 0; i < count + BATCH; i++) {
        vectors[i] = (struct iovec){frames + i % count * size, size};
        messages[i].msg_hdr.msg_iov = &vectors[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    return (int)count;
}

static int open_sender(const char *device)
{
    int fd = socket(AF_PACKET, SOCK_RAW, 0), on = 1;
    struct sockaddr_ll where = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(device)};
    if (fd < 0 || where.sll_ifindex == 0 || bind(fd, (struct sockaddr *)&where, sizeof where))
        fail(device);
    if (setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on))
        fail("PACKET_QDISC_BYPASS");
    return fd;
}

/* How many may have gone by now, at most a batch more than have. */
static int due(int64_t start, int64_t rate, int64_t done, int64_t count)
{
    int64_t left = count - done, most = left < BATCH ? left : BATCH;
    if (rate > 0) {
        int64_t allowed = (int64_t)((double)(now_ns() - start) * (double)rate * 1e-9) + 1 - done;
        most = allowed < most ? allowed : most;
    }
    return (int)most;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int64_t rate = atoll(argv[3]), count = atoll(argv[4]), done = 0, refused = 0, places = 0;
    int frames = read_frames((size_t)atoll(argv[2])), fd = open_sender(argv[1]);
    int64_t start = now_ns();
    while (done < count) {
        int size = due(start, rate, done, count);
        if (size <= 0)
            continue;
        int sent = sendmmsg(fd, messages + done % frames, (unsigned)size, 0);
        if (sent < 0 && errno != ENOBUFS && errno != EAGAIN)
            fail("sendmmsg");
        if (sent < 0) {
            refused++;
            places += done % frames;
        }
        done += sent < 0 ? 1 : sent;
    }
    printf("%lld %lld %lld %lld\n", (long long)(done - refused), (long long)refused, (long long)places,
           (long long)(now_ns() - start));
    return 0;
}
