/* What this machine can do: packets copied from one core into rings that the other core empties, and nothing else.
 *
 *     limits copy CORE CORE SIZE SOCKETS RING_BYTES METHOD PAGES GATHER REPEATS SECONDS
 *     limits cores CORE CORE SIZE SOCKETS RING_BYTES METHOD PAGES GATHER REPEATS SECONDS
 *
 * The producer copies packets of SIZE bytes out of prepared frames, flow by flow in turn as the synthetic netif has
 * them, into the rings of their sockets, and publishes the heads once a burst of 64. Records and rings are those of
 * dataplane/rings/lane.py: a header of 16 bytes, the packet, padding to 16 bytes; none wraps. It knows the socket of a
 * packet without looking at the packet. The consumer does what bench/demux.py's does: it sweeps over all rings, reads
 * a record's first word and the first and last byte of its payload, counts them for each socket, releases the ring,
 * and rests until GATHERed packets are in each ring that had any (0: never).
 *
 * METHOD: memcpy; vector (inlined, 64 bytes at a time); burst (vector, and the lines of the whole burst are prefetched
 * for writing before); ahead (vector, and those of the fourth packet from here are); stream (non-temporal stores);
 * demote (ahead, and lines that are complete are sent to the cache that both cores share). PAGES: small or huge.
 *
 * copy prints Mpps, a line for each repeat. Packets and the sums of the bytes read must be right for each socket.
 *
 * cores: two processes do the producer's part alone, each with its own memory, and nobody reads: a line for each repeat
 * with the Mpps of the first core alone, of the second one alone, and of both when both run.
 *
 *     limits clock CORE REPEATS
 *
 * The core's GHz, by multiplications that wait for each other: 3 cycles each on all x86-64 of the last 15 years.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BURST = 64, FLOWS_MIN = 1024, HEADER = 16, ALIGN = 16, LINE = 64, PAYLOAD = 28, AHEAD = 4 };
enum { LANE_HEAD = 0, LANE_TAIL = 128, LANE_CONSUMED = 136, LANE_DATA = 256, SLOT = 128, PAD = 1 << 24 };
enum { HEADS_AHEAD = 16, RECORDS_AHEAD = 8, REST_NS = 200000, WARM = 300000 };
enum method { MEMCPY, VECTOR, WHOLE_BURST, SOME_AHEAD, STREAM, DEMOTE, METHODS };

static const char *const method_names[METHODS] = {"memcpy", "vector", "burst", "ahead", "stream", "demote"};

struct lane {                   /* What the producer knows of a ring. */
    _Alignas(64) uint8_t *base;
    uint64_t head, published, tail;
};

struct seen {                   /* What the consumer knows of a ring, and of its socket. */
    _Alignas(64) uint8_t *base;
    uint64_t position, packets, octets, ends;
};

static struct {
    int cores[2];
    uint32_t size, sockets, flows, gather;
    uint64_t ring, mask, stride, need;
    enum method method;
    bool huge, drained;         /* drained: by nobody, tails follow heads. */
    int repeats;
    double seconds;
} o;

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

static uint8_t *frames;
static struct lane *lanes;
static struct seen *seen;
static uint64_t *ends_of_turn;  /* For each socket: the sum of the bytes read, of one packet of each flow. */
static _Atomic int64_t go_consumer, done_ns;

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static void *memory(size_t size)
{
    size_t step = 1 << 21, whole = (size + step - 1) & -step;
    int flags = MAP_ANONYMOUS | (o.huge ? MAP_PRIVATE : MAP_SHARED);
    uint8_t *at = mmap(NULL, whole + step, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (at == MAP_FAILED)
        fail("mmap");
    at += -(uintptr_t)at & (step - 1);
    if (o.huge && madvise(at, whole, MADV_HUGEPAGE))
        fail("madvise");
    memset(at, 0, size);
    return at;
}

static void prepare(void)
{
    size_t slot = SLOT + LANE_DATA + o.ring;
    frames = memory(o.flows * o.stride);
    lanes = memory(o.sockets * sizeof *lanes);
    seen = memory(o.sockets * sizeof *seen);
    ends_of_turn = memory(o.sockets * sizeof *ends_of_turn);
    uint8_t *slots = memory(o.sockets * slot);
    for (uint32_t i = 0; i < o.sockets; i++)
        lanes[i].base = seen[i].base = slots + i * slot + SLOT;
    uint64_t random = 1;
    for (uint32_t flow = 0; flow < o.flows; flow++) {
        uint8_t *frame = frames + flow * o.stride;
        for (uint32_t i = 0; i < o.size; i++)
            frame[i] = (uint8_t)((random = random * 6364136223846793005u + 1442695040888963407u) >> 56);
        ends_of_turn[flow % o.sockets] += frame[PAYLOAD] + frame[o.size - 1];
    }
}

/* ---- producer -------------------------------------------------------------------------------------------------- */

static inline void copy_vector(uint8_t *target, const uint8_t *source, uint32_t size)
{
    uint32_t i = 0;
    for (; i + 64 <= size; i += 64)
        memcpy(target + i, source + i, 64);
    if (size >= 64)
        memcpy(target + size - 64, source + size - 64, 64);
    else if (size >= 32) {
        memcpy(target, source, 32);
        memcpy(target + size - 32, source + size - 32, 32);
    } else
        memcpy(target, source, size);
}

/* Up to 15 bytes of padding are written as well: they belong to the record. */
static inline void copy_stream(uint8_t *target, const uint8_t *source, uint32_t size)
{
    for (uint32_t i = 0; i < size; i += 16)
        _mm_stream_si128((__m128i *)(target + i), _mm_loadu_si128((const __m128i *)(source + i)));
}

static inline void prefetch_record(const struct lane *lane)
{
    uint64_t at = lane->head & o.mask, left = o.mask + 1 - at;
    const uint8_t *record = lane->base + LANE_DATA + (left < o.need ? 0 : at);
    __builtin_prefetch(lane->base + LANE_HEAD, 1, 3);
    for (uint64_t i = 0; i < o.need; i += LINE)
        __builtin_prefetch(record + i, 1, 3);
    __builtin_prefetch(record + o.need - 1, 1, 3);
}

static inline void demote(uint8_t *record)
{
#ifdef __CLDEMOTE__
    uintptr_t first = (uintptr_t)record & -(uintptr_t)LINE, end = ((uintptr_t)record + o.need) & -(uintptr_t)LINE;
    for (; first < end; first += LINE)
        _cldemote((void *)first);
#else
    (void)record;
#endif
}

static inline void publish(struct lane *lane)
{
    if (lane->head == lane->published)
        return;
    lane->published = lane->head;
    atomic_store_explicit((_Atomic uint64_t *)(lane->base + LANE_HEAD), lane->head, memory_order_release);
}

static inline bool room(struct lane *lane, uint64_t need)
{
    if (o.drained || lane->head + need - lane->tail <= o.ring)
        return true;
    lane->tail = atomic_load_explicit((_Atomic uint64_t *)(lane->base + LANE_TAIL), memory_order_acquire);
    return lane->head + need - lane->tail <= o.ring;
}

/* A full ring: what is staged in it is given to the consumer, and then it is waited for. */
static __attribute__((noinline)) void wait_for_room(struct lane *lane, uint64_t need)
{
    _mm_sfence();               /* Non-temporal stores are not ordered by a release. */
    publish(lane);
    while (!room(lane, need))
        _mm_pause();
}

static inline void stage(struct lane *lane, const uint8_t *frame, enum method method)
{
    uint64_t at = lane->head & o.mask, left = o.mask + 1 - at, need = o.need + (left < o.need ? left : 0);
    uint8_t *data = lane->base + LANE_DATA;
    if (!room(lane, need))
        wait_for_room(lane, need);
    if (left < o.need) {
        *(uint64_t *)(data + at) = (left - HEADER) | PAD;
        at = 0;
    }
    uint64_t *record = (uint64_t *)(data + at);
    record[0] = o.size | (uint64_t)PAYLOAD << 32;
    record[1] = lane->head;     /* As much as a timestamp. */
    uint8_t *target = (uint8_t *)record + HEADER;
    if (method == MEMCPY)
        memcpy(target, frame, o.size);
    else if (method == STREAM)
        copy_stream(target, frame, o.size);
    else
        copy_vector(target, frame, o.size);
    if (method == DEMOTE)
        demote((uint8_t *)record);
    lane->head += need;
}

/* One burst from `flow` on; `flow` and the number of flows are multiples of BURST. */
static inline void burst(uint32_t flow, enum method method)
{
    struct lane *of[BURST + AHEAD];
    uint32_t socket = flow % o.sockets;
    for (uint32_t i = 0; i < BURST + AHEAD; i++) {
        of[i] = &lanes[socket];
        if (method == WHOLE_BURST && i < BURST)
            prefetch_record(of[i]);
        socket = socket + 1 == o.sockets ? 0 : socket + 1;
    }
    for (uint32_t i = 0; i < BURST; i++) {
        if (method == SOME_AHEAD || method == DEMOTE)
            prefetch_record(of[i + AHEAD]);
        stage(of[i], frames + (flow + i) * o.stride, method);
    }
    if (method == STREAM)
        _mm_sfence();
    for (uint32_t i = 0; i < BURST && i < o.sockets; i++)
        publish(of[i]);
}

#define WITH(method) case method: burst(flow, method); break;

static void produce(uint64_t packets)
{
    for (uint64_t sent = 0; sent < packets; sent += BURST) {
        uint32_t flow = sent % o.flows;
        switch (o.method) {
            WITH(MEMCPY) WITH(VECTOR) WITH(WHOLE_BURST) WITH(SOME_AHEAD) WITH(STREAM) WITH(DEMOTE)
            default: break;
        }
    }
}

/* ---- consumer -------------------------------------------------------------------------------------------------- */

struct sweep {
    uint64_t packets, lanes, crowded;
};

static inline uint64_t head_of(const struct seen *s)
{
    return atomic_load_explicit((_Atomic uint64_t *)(s->base + LANE_HEAD), memory_order_acquire);
}

static inline void look_ahead(uint32_t i)
{
    __builtin_prefetch(seen[(i + HEADS_AHEAD) % o.sockets].base + LANE_HEAD);
    const struct seen *soon = &seen[(i + RECORDS_AHEAD) % o.sockets];
    if (head_of(soon) != soon->position) {
        const uint8_t *record = soon->base + LANE_DATA + (soon->position & o.mask);
        __builtin_prefetch(record);
        __builtin_prefetch(record + LINE);
    }
}

static inline void take(struct seen *s, uint64_t head)
{
    uint64_t before = s->packets;
    while (s->position != head) {
        const uint8_t *record = s->base + LANE_DATA + (s->position & o.mask);
        uint64_t word = *(const uint64_t *)record, length = word & 0xffffff;
        s->position += (length + HEADER + ALIGN - 1) & -ALIGN;
        if (word & PAD)
            continue;
        const uint8_t *payload = record + HEADER + (word >> 32);
        uint64_t octets = length - (word >> 32);
        s->packets++;
        s->octets += octets;
        s->ends += payload[0] + payload[octets - 1];
    }
    uint64_t *consumed = (uint64_t *)(s->base + LANE_CONSUMED);
    *consumed += s->packets - before;
    atomic_store_explicit((_Atomic uint64_t *)(s->base + LANE_TAIL), head, memory_order_release);
}

static struct sweep sweep(void)
{
    struct sweep found = {0};
    for (uint32_t i = 0; i < o.sockets; i++) {
        look_ahead(i);
        struct seen *s = &seen[i];
        uint64_t head = head_of(s), before = s->packets;
        if (head == s->position)
            continue;
        found.lanes++;
        found.crowded += (head - s->position) * 4 > o.mask;
        take(s, head);
        found.packets += s->packets - before;
    }
    return found;
}

/* As Pace in dataplane/client/consume.py. */
static void rest(const struct sweep *found, int64_t period, int64_t took)
{
    if (found->packets == 0 || found->crowded != 0 || o.gather == 0)
        return;
    int64_t ns = period * (int64_t)(o.gather * found->lanes / found->packets) - took;
    int64_t end = now_ns() + (ns < REST_NS ? ns : REST_NS);
    while (now_ns() < end)
        for (int i = 0; i < 16; i++)
            _mm_pause();
}

static void consume(uint64_t packets)
{
    int64_t before = now_ns();
    while (packets != 0) {
        int64_t start = now_ns();
        struct sweep found = sweep();
        int64_t now = now_ns();
        packets -= found.packets;
        if (packets != 0)
            rest(&found, now - before, now - start);
        before = now;
    }
}

/* ---- copy ------------------------------------------------------------------------------------------------------ */

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

static void *consumer(void *unused)
{
    (void)unused;
    pin(o.cores[1]);
    for (;;) {
        int64_t packets;
        while ((packets = atomic_load(&go_consumer)) == 0)
            _mm_pause();
        if (packets < 0)
            return NULL;
        atomic_store(&go_consumer, 0);
        consume((uint64_t)packets);
        atomic_store(&done_ns, now_ns());
    }
}

static void check(uint64_t turns)
{
    uint64_t each = turns * (o.flows / o.sockets);
    for (uint32_t i = 0; i < o.sockets; i++) {
        struct seen *s = &seen[i];
        if (s->packets != each || s->ends != turns * ends_of_turn[i] || s->octets != each * (o.size - PAYLOAD)) {
            fprintf(stderr, "limits: socket %u did not get its packets\n", i);
            exit(1);
        }
        s->packets = s->octets = s->ends = 0;
    }
}

/* Packets a second; whole turns of all flows. */
static double copy_once(uint64_t turns)
{
    uint64_t packets = turns * o.flows;
    atomic_store(&done_ns, 0);
    atomic_store(&go_consumer, (int64_t)packets);
    int64_t start = now_ns(), end;
    produce(packets);
    while ((end = atomic_load(&done_ns)) == 0)
        _mm_pause();
    check(turns);
    return (double)packets / (double)(end - start) * 1e9;
}

static void copy(void)
{
    pthread_t thread;
    prepare();
    pin(o.cores[0]);
    if (pthread_create(&thread, NULL, consumer, NULL))
        fail("pthread_create");
    double rate = 0;
    for (int i = 0; i < 3; i++)
        rate = copy_once(WARM / o.flows + 1);
    for (int i = 0; i < o.repeats; i++)
        printf("%.4f\n", copy_once((uint64_t)(rate * o.seconds / o.flows) + 1) / 1e6);
    atomic_store(&go_consumer, -1);
    pthread_join(thread, NULL);
}

/* ---- cores ----------------------------------------------------------------------------------------------------- */

struct room_of_two {
    _Atomic int ready;
    double mpps[2];
};

/* Runs for SECONDS when all of `runners` are there. */
static void run_alone(struct room_of_two *shared, int which, int runners)
{
    pin(o.cores[which]);
    prepare();
    produce(WARM / o.flows * o.flows);
    atomic_fetch_add(&shared->ready, 1);
    while (atomic_load(&shared->ready) != runners)
        _mm_pause();
    int64_t start = now_ns(), end = start + (int64_t)(o.seconds * 1e9), now = start;
    uint64_t packets = 0;
    for (; now < end; now = now_ns(), packets += 16 * o.flows)
        produce(16 * o.flows);
    shared->mpps[which] = (double)packets / (double)(now - start) * 1e3;
}

static void run_on(struct room_of_two *shared, int first, int last)
{
    pid_t children[2];
    atomic_store(&shared->ready, 0);
    for (int which = first; which <= last; which++) {
        if ((children[which] = fork()) < 0)
            fail("fork");
        if (children[which] == 0) {
            run_alone(shared, which, last - first + 1);
            _exit(0);
        }
    }
    for (int which = first, status; which <= last; which++)
        if (waitpid(children[which], &status, 0) < 0 || status != 0)
            fail("a core's process");
}

static void cores(void)
{
    struct room_of_two *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        fail("mmap");
    o.drained = true;
    for (int i = 0; i < o.repeats; i++) {
        run_on(shared, 0, 0);
        run_on(shared, 1, 1);
        double alone[2] = {shared->mpps[0], shared->mpps[1]};
        run_on(shared, 0, 1);
        printf("%.4f %.4f %.4f %.4f\n", alone[0], alone[1], shared->mpps[0], shared->mpps[1]);
        fflush(stdout);
    }
}

/* ---- clock ----------------------------------------------------------------------------------------------------- */

static void ghz(int core, int repeats)
{
    const uint64_t rounds = 10000000;
    pin(core);
    for (int i = 0; i <= repeats; i++) {
        int64_t start = now_ns();
        uint64_t left = rounds;
        __asm__ volatile("1: imul $3, %%rax, %%rax; imul $3, %%rax, %%rax; imul $3, %%rax, %%rax;"
                         "imul $3, %%rax, %%rax; dec %0; jnz 1b" : "+r"(left) : : "rax", "cc");
        if (i != 0)             /* The first one wakes the core up. */
            printf("%.4f\n", 12.0 * (double)rounds / (double)(now_ns() - start));
    }
}

/* ---------------------------------------------------------------------------------------------------------------- */

static void read_options(char **argv)
{
    o.cores[0] = atoi(argv[2]);
    o.cores[1] = atoi(argv[3]);
    o.size = (uint32_t)atoi(argv[4]);
    o.sockets = (uint32_t)atoi(argv[5]);
    o.ring = strtoull(argv[6], NULL, 10);
    while (o.method < METHODS && strcmp(method_names[o.method], argv[7]) != 0)
        o.method++;
    o.huge = strcmp(argv[8], "huge") == 0;
    o.gather = (uint32_t)atoi(argv[9]);
    o.repeats = atoi(argv[10]);
    o.seconds = atof(argv[11]);
    o.mask = o.ring - 1;
    o.flows = o.sockets * (o.sockets < FLOWS_MIN ? FLOWS_MIN / o.sockets : 1);
    o.stride = (o.size + LINE - 1) & -(uint64_t)LINE;
    o.need = (o.size + HEADER + ALIGN - 1) & -(uint64_t)ALIGN;
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "clock") == 0) {
        ghz(atoi(argv[2]), atoi(argv[3]));
        return 0;
    }
    if (argc != 12)
        return 2;
    read_options(argv);
    if (o.method == METHODS || (o.ring & o.mask) != 0 || o.flows % BURST != 0 || o.size <= PAYLOAD)
        return 2;
    if (strcmp(argv[1], "copy") == 0)
        copy();
    else
        cores();
    return 0;
}
