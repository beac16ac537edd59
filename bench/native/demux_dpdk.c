/* Demultiplexing with DPDK: an RX lcore that validates UDP packets, finds their socket in an rte_hash and puts them
 * into the socket's own rte_ring; a consumer lcore that takes them out, reads the payload and frees them.
 *
 * Packets come from prepared frames in memory, in turn, as from a poll mode driver without copy: an mbuf of the mempool
 * gets the frame's address and length, which are the fields that a driver's rx_burst writes (--source attach).
 * `copy` copies the frame into the mbuf's own buffer instead.
 *
 * Which rings are not empty the consumer learns by sweeping over all (--find sweep, up to 1024 sockets the default),
 * with a rest between two sweeps (--rest) so that several packets gather in a ring: else each packet costs the transfer
 * of the ring's cache lines from core to core and back. Or from a list (--find active, beyond 1024 the default):
 * after each burst, and one full fence, the RX lcore sends the numbers of those sockets whose rings were empty before;
 * the consumer keeps a socket in a queue of its own until it sees the ring empty after a fence. So no store of one side
 * can be missed by the other, at one fence a burst, and sockets are served in turn.
 *
 * Prints one line of JSON. bench/demux_dpdk.py builds and runs it.
 */
#define ALLOW_EXPERIMENTAL_API  /* rte_prefetch0_write and rte_ipv4_udptcp_cksum_verify. */
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_hash.h>
#include <rte_hash_crc.h>
#include <rte_ip.h>
#include <rte_launch.h>
#include <rte_lcore.h>
#include <rte_malloc.h>
#include <rte_mbuf.h>
#include <rte_memory.h>
#include <rte_mempool.h>
#include <rte_prefetch.h>
#include <rte_ring.h>
#include <rte_ring_elem.h>
#include <rte_udp.h>

enum { BURST_MAX = RTE_HASH_LOOKUP_BULK_MAX, REPEATS_MAX = 64, VISITS = 32, TAKE = 32, FLAT = VISITS * TAKE };
enum { GROUP_SLOTS = 256, IMIX_SLOTS = 12, HEADERS = 28, FRAMES_MIN = 1024 };
enum { SOCKETS_PER_ADDRESS = 50000, SWEPT_MAX = 1024 };
enum source { ATTACH, COPY };

static const char *const source_names[] = {"attach", "copy"};
static const uint16_t imix_sizes[IMIX_SLOTS] = {60, 576, 60, 60, 576, 60, 1500, 60, 576, 60, 576, 60};

struct key {                    /* 16 bytes: rte_hash compares them in one step. */
    uint32_t remote_address, local_address;
    uint16_t remote_port, local_port;
    uint32_t protocol;
};

struct headers {
    struct rte_ipv4_hdr ip;
    struct rte_udp_hdr udp;
    uint32_t socket;            /* Begin of the payload: whose it is. */
} __rte_packed;

struct frame {
    uint8_t *at;
    uint32_t size;
};

struct tally {                  /* What the consumer knows of a socket. */
    uint64_t packets, octets, ends, wrong;
};

struct group {                  /* Packets of a burst that go to the same socket. */
    uint32_t socket, first, count;
};

static struct {
    uint32_t sockets, size, burst, ring, pool, cache, repeats, visits, cores[2];
    bool imix, wildcard, active, checksum, huge, thp, find;
    enum source source;
    double seconds, rest;
} o = {.sockets = 1024, .size = 60, .burst = 64, .cache = 512, .repeats = 5, .cores = {0, 1},
       .thp = true, .seconds = 1.0, .rest = -1};

static struct rte_mempool *pool;
static struct rte_mbuf *ahead[BURST_MAX];
static uint32_t have_ahead;
static struct rte_hash *table;
static struct rte_ring *news;   /* Numbers of sockets that have become active. */
static uint8_t *rings;          /* All rings, one behind the other. */
static size_t ring_stride;
static struct frame *frames;
static uint32_t frame_count;
static uint64_t frame_bytes;
static uint32_t next_frame;
static struct tally *tallies;
static int heap;                /* Where memory comes from. */
static const char *memory_kind = "4 KiB pages";

static struct {                 /* Of the RX lcore, in one run. */
    uint64_t sent, delivered, full, bad, unknown, waited, begun;
} rx __rte_cache_aligned;

static struct {                 /* Of the consumer, in one run. */
    uint64_t taken, idle, last;
} consumed __rte_cache_aligned;

static uint64_t stopped __rte_cache_aligned;    /* The RX lcore has sent its last packet. */

static void check(bool fine, const char *what)
{
    if (!fine) {
        fprintf(stderr, "demux_dpdk: %s: %s\n", what, rte_strerror(rte_errno));
        exit(1);
    }
}

static inline struct rte_ring *ring_of(uint32_t socket)
{
    return (struct rte_ring *)(rings + socket * ring_stride);
}

/* ---- frames ---------------------------------------------------------------------------------------------------- */

static struct key key_of_socket(uint32_t socket)
{
    struct key key = {.protocol = IPPROTO_UDP};
    key.local_address = rte_cpu_to_be_32(RTE_IPV4(198, 18, 0, 1) + socket / SOCKETS_PER_ADDRESS);
    key.local_port = rte_cpu_to_be_16(5000 + socket % SOCKETS_PER_ADDRESS);
    if (!o.wildcard) {          /* Times an odd number permutes. */
        key.remote_address = rte_cpu_to_be_32(RTE_IPV4(10, 0, 0, 0) | ((socket * 7919u + 77u) & 0xffffff));
        key.remote_port = rte_cpu_to_be_16(1024 + socket * UINT64_C(40503) % 64512);
    }
    return key;
}

static void fill_frame(uint8_t *at, uint32_t size, uint32_t number)
{
    struct headers *h = (struct headers *)at;
    uint32_t socket = number % o.sockets;
    struct key key = key_of_socket(socket);
    h->ip = (struct rte_ipv4_hdr){.version_ihl = 0x45, .total_length = rte_cpu_to_be_16(size), .time_to_live = 64,
                                  .fragment_offset = rte_cpu_to_be_16(RTE_IPV4_HDR_DF_FLAG),
                                  .next_proto_id = IPPROTO_UDP, .dst_addr = key.local_address};
    h->ip.src_addr = o.wildcard ? rte_cpu_to_be_32(RTE_IPV4(10, 0, 0, 0) | number) : key.remote_address;
    h->udp = (struct rte_udp_hdr){.dst_port = key.local_port, .dgram_len = rte_cpu_to_be_16(size - 20)};
    h->udp.src_port = o.wildcard ? rte_cpu_to_be_16(1024 + number * UINT64_C(40503) % 64512) : key.remote_port;
    h->socket = socket;
    for (uint32_t i = sizeof *h; i < size; i++)
        at[i] = (uint8_t)(i * 31 + number);
    h->ip.hdr_checksum = rte_ipv4_cksum(&h->ip);
    h->udp.dgram_cksum = rte_ipv4_udptcp_cksum(&h->ip, &h->udp);
}

static uint32_t size_of_frame(uint32_t number)
{
    return o.imix ? imix_sizes[number % IMIX_SLOTS] : o.size;
}

/* As many as sockets, a multiple of it; at least 1024. */
static void count_frames(void)
{
    frame_count = o.sockets >= FRAMES_MIN ? o.sockets : FRAMES_MIN / o.sockets * o.sockets;
    for (uint32_t i = 0; i < frame_count; i++)
        frame_bytes += RTE_ALIGN_CEIL(size_of_frame(i), RTE_CACHE_LINE_SIZE);
}

static void make_frames(void)
{
    uint8_t *at = rte_malloc_socket("frames", frame_bytes, RTE_CACHE_LINE_SIZE, heap);
    frames = rte_malloc_socket("frame", (frame_count + 2 * BURST_MAX) * sizeof *frames, RTE_CACHE_LINE_SIZE, heap);
    check(at != NULL && frames != NULL, "memory of frames");
    for (uint32_t i = 0; i < frame_count; i++) {
        uint32_t size = size_of_frame(i);
        fill_frame(at, size, i);
        frames[i] = (struct frame){at, size};
        at += RTE_ALIGN_CEIL(size, RTE_CACHE_LINE_SIZE);
    }
    for (uint32_t i = 0; i < 2 * BURST_MAX; i++)    /* So that a burst need not ask where the end is. */
        frames[frame_count + i] = frames[i % frame_count];
}

/* ---- RX lcore -------------------------------------------------------------------------------------------------- */

/* mbufs of the next frames, as from rte_eth_rx_burst: a driver as well keeps empty mbufs ahead. */
static inline bool receive(struct rte_mbuf **mbufs, uint32_t n)
{
    if (have_ahead == 0 && rte_mempool_get_bulk(pool, (void **)ahead, n) != 0)
        return false;
    memcpy(mbufs, ahead, n * sizeof *mbufs);
    have_ahead = rte_mempool_get_bulk(pool, (void **)ahead, n) == 0 ? n : 0;
    const struct frame *f = frames + next_frame;
    for (uint32_t i = 0; i < n; i++) {
        rte_prefetch0(f[i + BURST_MAX].at);
        if (have_ahead != 0)
            rte_prefetch0_write(ahead[i]);
        if (o.source == ATTACH)
            mbufs[i]->buf_addr = f[i].at;
        else
            rte_memcpy(rte_pktmbuf_mtod(mbufs[i], void *), f[i].at, f[i].size);
        mbufs[i]->data_len = f[i].size;
        mbufs[i]->pkt_len = f[i].size;
    }
    next_frame += n;
    if (next_frame >= frame_count)
        next_frame %= frame_count;
    return true;
}

/* RFC 1071 over the 20 bytes: 0xffff if they are as they were sent. */
static inline bool header_sum_fails(const struct rte_ipv4_hdr *ip)
{
    uint32_t w[5];
    memcpy(w, ip, sizeof w);
    uint64_t sum = (uint64_t)w[0] + w[1] + w[2] + w[3] + w[4];
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return sum != 0xffff;
}

static inline bool is_bad(const struct headers *h, uint32_t length)
{
    uint32_t total = rte_be_to_cpu_16(h->ip.total_length);
    if (h->ip.version_ihl != 0x45 || length < HEADERS || total < HEADERS || total > length)
        return true;
    if (h->ip.next_proto_id != IPPROTO_UDP || header_sum_fails(&h->ip))
        return true;
    if ((h->ip.fragment_offset & rte_cpu_to_be_16(RTE_IPV4_HDR_MF_FLAG | RTE_IPV4_HDR_OFFSET_MASK)) != 0)
        return true;
    uint32_t octets = rte_be_to_cpu_16(h->udp.dgram_len);
    if (octets < sizeof h->udp || octets > total - sizeof h->ip)
        return true;
    return o.checksum && rte_ipv4_udptcp_cksum_verify(&h->ip, &h->udp) != 0;
}

static inline struct key key_of(const struct headers *h)
{
    struct key key = {.protocol = IPPROTO_UDP, .local_address = h->ip.dst_addr, .local_port = h->udp.dst_port};
    if (!o.wildcard) {
        key.remote_address = h->ip.src_addr;
        key.remote_port = h->udp.src_port;
    }
    return key;
}

/* Validates and looks up; leaves the mbufs that have a socket, frees the others: how many are left. */
static inline uint32_t classify(struct rte_mbuf **mbufs, uint32_t n, uint32_t *sockets)
{
    struct key keys[BURST_MAX];
    const void *pointers[BURST_MAX];
    hash_sig_t sums[BURST_MAX];
    void *found[BURST_MAX];
    uint32_t good = 0, left = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct headers *h = rte_pktmbuf_mtod(mbufs[i], const struct headers *);
        if (unlikely(is_bad(h, mbufs[i]->data_len))) {
            rte_mempool_put(pool, mbufs[i]);
            rx.bad++;
            continue;
        }
        mbufs[good] = mbufs[i];
        keys[good] = key_of(h);
        pointers[good] = &keys[good];
        sums[good] = rte_hash_crc(&keys[good], sizeof keys[good], 0);
        good++;
    }
    if (unlikely(good == 0))
        return 0;
    uint64_t hits = 0;
    rte_hash_lookup_with_hash_bulk_data(table, pointers, sums, good, &hits, found);
    for (uint32_t i = 0; i < good; i++) {
        if (unlikely((hits >> i & 1) == 0)) {
            rte_mempool_put(pool, mbufs[i]);
            rx.unknown++;
            continue;
        }
        mbufs[left] = mbufs[i];
        sockets[left] = (uint32_t)(uintptr_t)found[i];
        const struct rte_ring *ring = ring_of(sockets[left++]);
        rte_prefetch0_write(&ring->prod);
        rte_prefetch0(&ring->cons);
        rte_prefetch0_write((void *const *)(ring + 1) + (ring->prod.head & ring->mask));
    }
    return left;
}

/* Brings together what goes to the same socket, in order: how many groups. */
static inline uint32_t gather(struct rte_mbuf **mbufs, const uint32_t *sockets, uint32_t n, struct rte_mbuf **sorted,
                              struct group *groups)
{
    static struct { uint64_t stamp; uint32_t socket, group; } seen[GROUP_SLOTS];
    static uint64_t stamp;
    uint32_t count = 0, of[BURST_MAX];
    stamp++;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t s = sockets[i] % GROUP_SLOTS;
        while (seen[s].stamp == stamp && seen[s].socket != sockets[i])
            s = (s + 1) % GROUP_SLOTS;
        if (seen[s].stamp != stamp) {
            seen[s].stamp = stamp;
            seen[s].socket = sockets[i];
            seen[s].group = count;
            groups[count++] = (struct group){.socket = sockets[i]};
        }
        of[i] = seen[s].group;
        groups[of[i]].count++;
    }
    for (uint32_t g = 0, first = 0; g < count; g++) {
        groups[g].first = first;
        first += groups[g].count;
        groups[g].count = 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct group *g = &groups[of[i]];
        sorted[g->first + g->count++] = mbufs[i];
    }
    return count;
}

/* Tells the consumer of rings that were empty: their consumer had come as far as the producer was before. */
static inline void announce(const struct group *groups, const uint32_t *before, uint32_t count)
{
    uint32_t new[BURST_MAX], n = 0;
    rte_smp_mb();
    for (uint32_t g = 0; g < count; g++) {
        new[n] = groups[g].socket;
        n += __atomic_load_n(&ring_of(groups[g].socket)->cons.tail, __ATOMIC_RELAXED) == before[g];
    }
    for (uint32_t done = 0; done < n;)
        done += rte_ring_sp_enqueue_burst_elem(news, new + done, sizeof *new, n - done, NULL);
}

static inline void deliver(struct rte_mbuf **sorted, const struct group *groups, uint32_t count)
{
    uint32_t before[BURST_MAX];
    for (uint32_t g = 0; g < count; g++) {
        struct rte_ring *ring = ring_of(groups[g].socket);
        struct rte_mbuf **from = sorted + groups[g].first;
        uint32_t n = groups[g].count;
        before[g] = ring->prod.head;
        uint32_t put = rte_ring_sp_enqueue_burst(ring, (void **)from, n, NULL);
        rx.delivered += put;
        if (unlikely(put < n)) {
            rte_mempool_put_bulk(pool, (void **)(from + put), n - put);
            rx.full += n - put;
        }
    }
    if (o.active)
        announce(groups, before, count);
}

static __rte_noinline bool wait_for_mbufs(struct rte_mbuf **mbufs, uint64_t end)
{
    uint64_t begun = rte_rdtsc(), now = begun;
    bool got = false;
    while (!got && now < end) {
        rte_pause();
        got = receive(mbufs, o.burst);
        now = rte_rdtsc();
    }
    rx.waited += now - begun;
    return got;
}

static void rx_run(double seconds)
{
    struct rte_mbuf *mbufs[BURST_MAX], *sorted[BURST_MAX];
    struct group groups[BURST_MAX];
    uint32_t sockets[BURST_MAX];
    rx.begun = rte_rdtsc();
    uint64_t end = rx.begun + (uint64_t)(seconds * rte_get_tsc_hz());
    while (rte_rdtsc() < end) {
        if (unlikely(!receive(mbufs, o.burst)) && !wait_for_mbufs(mbufs, end))
            break;
        rx.sent += o.burst;
        uint32_t n = classify(mbufs, o.burst, sockets);
        deliver(sorted, groups, gather(mbufs, sockets, n, sorted, groups));
    }
    __atomic_store_n(&stopped, 1, __ATOMIC_RELEASE);
}

/* ---- consumer -------------------------------------------------------------------------------------------------- */

struct visit {
    uint32_t socket, count;
};

static inline void read_packets(uint32_t socket, struct rte_mbuf **mbufs, uint32_t n)
{
    struct tally sum = tallies[socket];
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *payload = rte_pktmbuf_mtod_offset(mbufs[i], const uint8_t *, HEADERS);
        uint32_t size = mbufs[i]->data_len - HEADERS, whose;
        memcpy(&whose, payload, sizeof whose);
        sum.octets += size;
        sum.ends += payload[0] + payload[size - 1];
        sum.wrong += whose != socket;
    }
    sum.packets += n;
    tallies[socket] = sum;
}

/* Empties these sockets' rings, up to TAKE packets of each: how many packets. */
static inline uint32_t serve(struct visit *visits, uint32_t count)
{
    static struct rte_mbuf *flat[FLAT];
    uint32_t n = 0;
    for (uint32_t v = 0; v < count; v++) {
        uint32_t got = rte_ring_sc_dequeue_burst(ring_of(visits[v].socket), (void **)(flat + n), TAKE, NULL);
        visits[v].count = got;
        for (uint32_t i = 0; i < got; i++)
            rte_prefetch0(flat[n + i]);
        if (got != 0)
            rte_prefetch0(&tallies[visits[v].socket]);
        n += got;
    }
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *at = rte_pktmbuf_mtod(flat[i], const uint8_t *);
        rte_prefetch0(at);
        rte_prefetch0(at + flat[i]->data_len - 1);
    }
    for (uint32_t v = 0, first = 0; v < count; v++) {
        if (visits[v].count != 0)
            read_packets(visits[v].socket, flat + first, visits[v].count);
        first += visits[v].count;
    }
    if (n != 0)
        rte_mempool_put_bulk(pool, (void **)flat, n);
    return n;
}

static inline void prefetch_ring(uint32_t socket)
{
    const struct rte_ring *ring = ring_of(socket);
    rte_prefetch0(&ring->prod);
    rte_prefetch0(&ring->cons);
}

/* Time without packets is idle; the last packet ends the run. */
static inline bool goes_on(uint32_t packets, uint64_t *since)
{
    uint64_t now = rte_rdtsc();
    if (packets != 0) {
        consumed.taken += packets;
        consumed.last = now;
    } else {
        consumed.idle += now - *since;
    }
    *since = now;
    return packets != 0 || !__atomic_load_n(&stopped, __ATOMIC_ACQUIRE);
}

/* Lets packets gather: sweeps begin --rest microseconds after each other at least. */
static inline void rest(uint64_t *round)
{
    uint64_t next = *round + (uint64_t)(o.rest * 1e-6 * rte_get_tsc_hz());
    while ((*round = rte_rdtsc()) < next && !__atomic_load_n(&stopped, __ATOMIC_RELAXED))
        rte_pause();
}

static int sweep_run(void *unused __rte_unused)
{
    struct visit visits[VISITS];
    uint64_t since = rte_rdtsc(), round = since;
    bool more = true;
    while (more) {
        /* What was sent before `stopped` was set must be found: so it is read before the sweep that finds nothing. */
        bool last = __atomic_load_n(&stopped, __ATOMIC_ACQUIRE);
        uint32_t packets = 0;
        for (uint32_t first = 0; first < o.sockets; first += o.visits) {
            uint32_t n = RTE_MIN(o.visits, o.sockets - first);
            for (uint32_t v = 0; v < n; v++) {
                visits[v].socket = first + v;
                if (first + o.visits + v < o.sockets)
                    prefetch_ring(first + o.visits + v);
            }
            packets += serve(visits, n);
        }
        more = goes_on(packets, &since) || !last;
        rest(&round);
    }
    return 0;
}

struct queue {                  /* Active sockets, each at most once. */
    uint32_t *ids, mask, head, tail;
    uint8_t *listed;
};

static inline void hear(struct queue *q)
{
    uint32_t new[BURST_MAX];
    uint32_t n = rte_ring_sc_dequeue_burst_elem(news, new, sizeof *new, BURST_MAX, NULL);
    for (uint32_t i = 0; i < n; i++) {
        if (q->listed[new[i]])
            continue;
        q->listed[new[i]] = 1;
        q->ids[q->tail++ & q->mask] = new[i];
        prefetch_ring(new[i]);
    }
}

static inline uint32_t serve_active(struct queue *q)
{
    struct visit visits[VISITS];
    uint32_t n = RTE_MIN(o.visits, q->tail - q->head);
    for (uint32_t v = 0; v < n; v++)
        visits[v].socket = q->ids[q->head++ & q->mask];
    for (uint32_t v = 0, ahead = RTE_MIN(o.visits, q->tail - q->head); v < ahead; v++)
        prefetch_ring(q->ids[(q->head + v) & q->mask]);
    uint32_t packets = serve(visits, n);
    rte_smp_mb();
    for (uint32_t v = 0; v < n; v++) {
        if (rte_ring_empty(ring_of(visits[v].socket)))
            q->listed[visits[v].socket] = 0;
        else
            q->ids[q->tail++ & q->mask] = visits[v].socket;
    }
    return packets;
}

static int active_run(void *queue)
{
    struct queue *q = queue;
    uint64_t since = rte_rdtsc();
    bool more = true;
    while (more) {
        bool last = __atomic_load_n(&stopped, __ATOMIC_ACQUIRE);
        hear(q);
        uint32_t packets = q->head != q->tail ? serve_active(q) : 0;
        more = goes_on(packets, &since) || !last || q->head != q->tail || !rte_ring_empty(news);
    }
    return 0;
}

/* ---- before the clock runs ------------------------------------------------------------------------------------- */

static void no_headroom(struct rte_mempool *of __rte_unused, void *unused __rte_unused, void *object,
                        unsigned number __rte_unused)
{
    ((struct rte_mbuf *)object)->data_off = 0;
}

static void make_pool(void)
{
    uint32_t room = o.source == ATTACH ? 0 : RTE_ALIGN_CEIL(o.imix ? 1500u : o.size, RTE_CACHE_LINE_SIZE);
    pool = rte_pktmbuf_pool_create("mbufs", o.pool, o.cache, 0, room, heap);
    check(pool != NULL, "mempool");
    check(rte_mempool_obj_iter(pool, no_headroom, NULL) == pool->populated_size, "mbufs");
}

static void make_table(void)
{
    struct rte_hash_parameters p = {
        .name = "sockets", .entries = RTE_MAX(2 * o.sockets, 1024u), .key_len = sizeof(struct key),
        .hash_func = rte_hash_crc, .extra_flag = RTE_HASH_EXTRA_FLAGS_RW_CONCURRENCY_LF,
        .socket_id = heap};
    table = rte_hash_create(&p);
    check(table != NULL, "hash table");
    for (uint32_t s = 0; s < o.sockets; s++) {
        struct key key = key_of_socket(s);
        check(rte_hash_add_key_data(table, &key, (void *)(uintptr_t)s) == 0, "entry of hash table");
    }
    check(rte_hash_count(table) == (int32_t)o.sockets, "keys of sockets differ");
}

static void make_rings(void)
{
    ring_stride = RTE_ALIGN_CEIL((size_t)rte_ring_get_memsize(o.ring), RTE_CACHE_LINE_SIZE);
    rings = rte_zmalloc_socket("rings", o.sockets * ring_stride, RTE_CACHE_LINE_SIZE, heap);
    tallies = rte_zmalloc_socket("tallies", o.sockets * sizeof *tallies, RTE_CACHE_LINE_SIZE, heap);
    check(rings != NULL && tallies != NULL, "memory of sockets");
    for (uint32_t s = 0; s < o.sockets; s++)
        check(rte_ring_init(ring_of(s), "socket", o.ring, RING_F_SP_ENQ | RING_F_SC_DEQ) == 0, "ring");
    uint32_t most = rte_align32pow2(RTE_MAX(4 * o.sockets, 4096u));
    news = rte_ring_create_elem("news", sizeof(uint32_t), most, heap, RING_F_SP_ENQ | RING_F_SC_DEQ);
    check(news != NULL, "ring of active sockets");
}

static struct queue *make_queue(void)
{
    uint32_t most = rte_align32pow2(o.sockets + 1);
    struct queue *q = rte_zmalloc_socket("queue", sizeof *q, RTE_CACHE_LINE_SIZE, heap);
    check(q != NULL, "queue");
    q->ids = rte_zmalloc_socket("ids", most * sizeof *q->ids, RTE_CACHE_LINE_SIZE, heap);
    q->listed = rte_zmalloc_socket("listed", o.sockets, RTE_CACHE_LINE_SIZE, heap);
    check(q->ids != NULL && q->listed != NULL, "queue");
    q->mask = most - 1;
    return q;
}

/* ---- EAL ------------------------------------------------------------------------------------------------------- */

static uint64_t bytes_needed(void)
{
    uint64_t room = o.source == ATTACH ? 0 : o.imix ? 1536 : RTE_ALIGN_CEIL(o.size, RTE_CACHE_LINE_SIZE);
    uint64_t of_socket = 512 + 8 * (uint64_t)o.ring + 256 + sizeof(struct tally) + 32;
    return frame_bytes + frame_count * sizeof(struct frame) + o.pool * (256 + room) + o.sockets * of_socket;
}

static bool enough_hugepages(uint64_t bytes)
{
    FILE *file = fopen("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "r");
    uint64_t pages = 0;
    if (file == NULL)
        return false;
    if (fscanf(file, "%" SCNu64, &pages) != 1)
        pages = 0;
    fclose(file);
    return pages << 21 >= bytes;
}

/* Without hugepages the EAL has 4 KiB pages. So memory that the kernel backs by transparent huge pages becomes a heap
 * of its own, as external memory does. */
static void make_heap(uint64_t bytes)
{
    uint64_t pages = bytes >> 21, step = RTE_PGSIZE_2M;
    uint8_t *at = mmap(NULL, (pages + 1) * step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    rte_iova_t *places = calloc(pages, sizeof *places);
    check(at != MAP_FAILED && places != NULL, "memory of heap");
    at = RTE_PTR_ALIGN_CEIL(at, step);
    check(madvise(at, pages * step, MADV_HUGEPAGE) == 0, "madvise");
    for (uint64_t i = 0; i < pages; i++)
        places[i] = (rte_iova_t)(at + i * step);
    check(rte_malloc_heap_create("thp") == 0, "heap");
    check(rte_malloc_heap_memory_add("thp", at, pages * step, places, pages, step) == 0, "memory to heap");
    heap = rte_malloc_heap_get_socket("thp");
    check(heap >= 0, "number of heap");
    free(places);
}

static void start_eal(void)
{
    uint64_t megabytes = ((bytes_needed() + bytes_needed() / 4) >> 20) + 192;
    char cores[32], memory[32], main_core[16];
    o.huge = enough_hugepages(megabytes << 20);
    bool own = !o.huge && o.thp;
    snprintf(cores, sizeof cores, "%u,%u", o.cores[0], o.cores[1]);
    snprintf(main_core, sizeof main_core, "%u", o.cores[0]);
    snprintf(memory, sizeof memory, "%" PRIu64, own ? 64 : megabytes);
    char *arguments[] = {"demux_dpdk", "-l", cores, "--main-lcore", main_core, "-m", memory, "--no-pci",
                         "--no-telemetry", "--log-level=error", "--no-shconf", "--no-huge", NULL};
    int count = RTE_DIM(arguments) - 1;
    if (o.huge)
        arguments[--count - 1] = "--in-memory";
    check(rte_eal_init(count, arguments) == count - 1, "EAL");
    heap = (int)rte_socket_id();
    if (own)
        make_heap(megabytes << 20);
}

/* Of what kind most memory has become. */
static void look_at_memory(void)
{
    char line[256];
    uint64_t kilobytes, all = 0, huge = 0;
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    check(file != NULL, "smaps_rollup");
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "Rss: %" SCNu64, &kilobytes) == 1)
            all = kilobytes;
        else if (sscanf(line, "AnonHugePages: %" SCNu64, &kilobytes) == 1)
            huge = kilobytes;
    }
    fclose(file);
    memory_kind = o.huge ? "hugepages" : 2 * huge > all ? "transparent huge pages" : "4 KiB pages";
}

/* ---- runs ------------------------------------------------------------------------------------------------------ */

/* Every packet is with its socket, or counted as dropped; what was freed is in the pool again. */
static uint64_t verify(void)
{
    uint64_t packets = 0, octets = 0, wrong = 0;
    for (uint32_t s = 0; s < o.sockets; s++) {
        check(o.imix || tallies[s].octets == tallies[s].packets * (o.size - HEADERS), "bytes of a socket");
        packets += tallies[s].packets;
        octets += tallies[s].octets;
        wrong += tallies[s].wrong;
    }
    check(wrong == 0, "a packet came to the wrong socket");
    check(rx.bad == 0 && rx.unknown == 0, "a packet was bad or nobody's");
    check(packets == consumed.taken && packets == rx.delivered && packets == rx.sent - rx.full, "packets were lost");
    check(rte_mempool_avail_count(pool) + have_ahead == pool->size, "mbufs were lost");
    return octets + packets * HEADERS;
}

static void run_once(struct queue *queue, double seconds)
{
    memset(&rx, 0, sizeof rx);
    memset(&consumed, 0, sizeof consumed);
    memset(tallies, 0, o.sockets * sizeof *tallies);
    stopped = 0;
    check(rte_eal_remote_launch(o.active ? active_run : sweep_run, queue, o.cores[1]) == 0, "launch");
    rx_run(seconds);
    check(rte_eal_wait_lcore(o.cores[1]) == 0, "consumer");
}

static void print_values(const char *name, const double *values)
{
    printf("\"%s\": [", name);
    for (uint32_t i = 0; i < o.repeats; i++)
        printf("%s%.5g", i ? ", " : "", values[i]);
    printf("], ");
}

static void measure(void)
{
    double mpps[REPEATS_MAX], gbit[REPEATS_MAX], dropped[REPEATS_MAX], waited[REPEATS_MAX], idle[REPEATS_MAX];
    struct queue *queue = make_queue();
    run_once(queue, o.seconds / 2);
    verify();
    for (uint32_t i = 0; i < o.repeats; i++) {
        run_once(queue, o.seconds);
        double ticks = consumed.last - rx.begun, seconds = ticks / rte_get_tsc_hz();
        gbit[i] = verify() * 8 / seconds / 1e9;
        mpps[i] = consumed.taken / seconds / 1e6;
        dropped[i] = (double)rx.full / rx.sent;
        waited[i] = rx.waited / ticks;
        idle[i] = consumed.idle / ticks;
    }
    look_at_memory();
    printf("{");
    print_values("mpps", mpps);
    print_values("gbit_s", gbit);
    print_values("dropped", dropped);
    print_values("rx_waits", waited);
    print_values("consumer_idle", idle);
    printf("\"memory\": \"%s\", \"burst\": %u, \"ring\": %u, \"pool\": %u, \"cache\": %u, \"find\": \"%s\", "
           "\"rest_us\": %g}\n", memory_kind, o.burst, o.ring, o.pool, o.cache, o.active ? "active" : "sweep", o.rest);
}

/* ---- options --------------------------------------------------------------------------------------------------- */

static const struct option options[] = {
    {"sockets", required_argument, NULL, 'n'}, {"size", required_argument, NULL, 's'},
    {"kind", required_argument, NULL, 'k'}, {"seconds", required_argument, NULL, 't'},
    {"repeats", required_argument, NULL, 'r'}, {"burst", required_argument, NULL, 'b'},
    {"ring", required_argument, NULL, 'R'}, {"pool", required_argument, NULL, 'p'},
    {"cache", required_argument, NULL, 'c'}, {"source", required_argument, NULL, 'S'},
    {"find", required_argument, NULL, 'f'}, {"visits", required_argument, NULL, 'v'},
    {"cores", required_argument, NULL, 'l'}, {"udp-checksum", no_argument, NULL, 'u'},
    {"rest", required_argument, NULL, 'i'}, {"no-thp", no_argument, NULL, 'T'}, {NULL, 0, NULL, 0}};

static enum source source_named(const char *name)
{
    for (uint32_t i = 0; i < RTE_DIM(source_names); i++)
        if (strcmp(name, source_names[i]) == 0)
            return i;
    check(false, "--source");
    return ATTACH;
}

static void take_option(int letter, const char *value)
{
    switch (letter) {
    case 'n': o.sockets = strtoul(value, NULL, 10); break;
    case 's': o.imix = strcmp(value, "imix") == 0; o.size = o.imix ? 60 : strtoul(value, NULL, 10); break;
    case 'k': o.wildcard = strcmp(value, "wildcard") == 0; break;
    case 't': o.seconds = strtod(value, NULL); break;
    case 'r': o.repeats = strtoul(value, NULL, 10); break;
    case 'b': o.burst = strtoul(value, NULL, 10); break;
    case 'R': o.ring = strtoul(value, NULL, 10); break;
    case 'p': o.pool = strtoul(value, NULL, 10); break;
    case 'c': o.cache = strtoul(value, NULL, 10); break;
    case 'S': o.source = source_named(value); break;
    case 'f': o.active = strcmp(value, "active") == 0; o.find = true; break;
    case 'v': o.visits = strtoul(value, NULL, 10); break;
    case 'l': check(sscanf(value, "%u,%u", &o.cores[0], &o.cores[1]) == 2, "--cores"); break;
    case 'u': o.checksum = true; break;
    case 'i': o.rest = strtod(value, NULL); break;
    case 'T': o.thp = false; break;
    default: check(false, "an option is unknown");
    }
}

static void take_options(int argc, char **argv)
{
    for (int letter; (letter = getopt_long(argc, argv, "", options, NULL)) != -1;)
        take_option(letter, optarg);
    if (o.ring == 0)
        o.ring = o.sockets <= 1024 ? 512 : 64;
    if (o.pool == 0)
        o.pool = 8191;
    if (o.visits == 0)
        o.visits = VISITS;
    if (!o.find)
        o.active = o.sockets > SWEPT_MAX;
    if (o.rest < 0)             /* About five packets a socket gather at 25 Mpps. */
        o.rest = o.active || o.sockets == 1 ? 0 : RTE_MIN(o.sockets / 5.0, 200.0);
    check(o.sockets >= 1 && o.sockets <= 1 << 20 && o.size >= 36 && o.size <= 1500, "--sockets, --size");
    check(o.burst >= 1 && o.burst <= BURST_MAX && rte_is_power_of_2(o.ring), "--burst, --ring");
    check(o.visits >= 1 && o.visits <= VISITS && o.repeats >= 1 && o.repeats <= REPEATS_MAX, "--visits, --repeats");
}

int main(int argc, char **argv)
{
    take_options(argc, argv);
    count_frames();
    start_eal();
    make_frames();
    make_pool();
    make_rings();
    make_table();
    measure();
    return rte_eal_cleanup() == 0 ? 0 : 1;
}
