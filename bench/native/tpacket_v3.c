/* Reads an interface through the kernel's packet ring and counts: tpacket_v3 DEVICE BLOCK_BYTES BLOCKS TIMEOUT_MS COUNT
 *
 * The least that a reader of TPACKET_V3 can do: it looks at each frame's ring header, and at one word of its headers
 * and one of its payload, and gives whole blocks back. Sleeps in poll(2) when the kernel has handed over none.
 * Ends after COUNT frames, or when none has come for half a second.
 *
 * Prints "ready"; at the end frames, their bytes, the sum of the payloads' first words, nanoseconds of CPU time,
 * frames that the kernel dropped.
 */
#include "counted.h"

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

enum { PAYLOAD = ETH_HLEN + 20 + 8, PATIENCE_MS = 500, FRAME_BYTES = 2048 };

static char *open_ring(int fd, struct tpacket_req3 *request, const char *device)
{
    int version = TPACKET_V3, on = 1;
    size_t size = (size_t)request->tp_block_size * request->tp_block_nr;
    struct sockaddr_ll where = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL),
                                .sll_ifindex = (int)if_nametoindex(device)};
    if (setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version, sizeof version)
        || setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &on, sizeof on)
        || setsockopt(fd, SOL_PACKET, PACKET_RX_RING, request, sizeof *request))
        fail("ring");
    char *ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ring == MAP_FAILED)
        fail("mmap");
    if (where.sll_ifindex == 0 || bind(fd, (struct sockaddr *)&where, sizeof where))
        fail(device);
    return ring;
}

static void read_block(const struct tpacket_block_desc *block, struct tally *tally)
{
    const struct tpacket3_hdr *packet =
        (const struct tpacket3_hdr *)((const char *)block + block->hdr.bh1.offset_to_first_pkt);
    for (uint32_t i = 0; i < block->hdr.bh1.num_pkts; i++) {
        const char *frame = (const char *)packet + packet->tp_mac;
        uint16_t ethertype;
        uint64_t number;
        memcpy(&ethertype, frame + 12, sizeof ethertype);
        if (ethertype == htons(ETH_P_IP)) {
            memcpy(&number, frame + PAYLOAD, sizeof number);
            tally->frames++;
            tally->bytes += packet->tp_snaplen - ETH_HLEN;
            tally->sum += (int64_t)number;
        }
        packet = (const struct tpacket3_hdr *)((const char *)packet + packet->tp_next_offset);
        __builtin_prefetch((const char *)packet + 8 * packet->tp_next_offset);
        __builtin_prefetch((const char *)packet + 8 * packet->tp_next_offset + 64);
    }
}

static void read_all(int fd, char *ring, const struct tpacket_req3 *request, int64_t count, struct tally *tally)
{
    struct pollfd waiting = {.fd = fd, .events = POLLIN};
    for (uint32_t next = 0; tally->frames < count; next = (next + 1) % request->tp_block_nr) {
        struct tpacket_block_desc *block =
            (struct tpacket_block_desc *)(ring + (size_t)next * request->tp_block_size);
        while (!(__atomic_load_n(&block->hdr.bh1.block_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
            if (poll(&waiting, 1, tally->frames ? PATIENCE_MS : 20 * PATIENCE_MS) == 0)
                return;
        read_block(block, tally);
        __atomic_store_n(&block->hdr.bh1.block_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
    }
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    struct tpacket_req3 request = {.tp_block_size = (unsigned)atoi(argv[2]), .tp_block_nr = (unsigned)atoi(argv[3]),
                                   .tp_frame_size = FRAME_BYTES, .tp_retire_blk_tov = (unsigned)atoi(argv[4])};
    request.tp_frame_nr = request.tp_block_size / FRAME_BYTES * request.tp_block_nr;
    int fd = socket(AF_PACKET, SOCK_RAW, 0);
    if (fd < 0)
        fail("socket");
    char *ring = open_ring(fd, &request, argv[1]);
    struct tally tally = {0};
    say_ready();
    int64_t begun = clock_now(CLOCK_PROCESS_CPUTIME_ID);
    read_all(fd, ring, &request, atoll(argv[5]), &tally);
    struct tpacket_stats_v3 stats;
    socklen_t size = sizeof stats;
    if (getsockopt(fd, SOL_PACKET, PACKET_STATISTICS, &stats, &size))
        fail("PACKET_STATISTICS");
    say_result(&tally, begun, stats.tp_drops);
    return 0;
}
