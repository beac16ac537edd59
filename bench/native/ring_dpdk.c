/*
 * The peer of bench/ring.py: DPDK's rte_ring between two pinned threads, single producer and single consumer.
 *
 *     ring_dpdk WHAT PRODUCER CONSUMER BATCH SIZE CAPACITY RING_BYTES REPEATS SECONDS
 *
 * WHAT is
 *     items      rte_ring_enqueue_bulk and rte_ring_dequeue_bulk of 8-byte items, the functions for one if BATCH is 1
 *     elem       the same with the functions for elements of any size
 *     records    buffers of SIZE bytes, RING_BYTES in all: filled by rte_memcpy, their addresses enqueued in bulk,
 *                compared with what they must be, and given back through a second ring
 *
 * The clock runs from just before the first item until the consumer has verified the last. A warm-up finds how many
 * items last SECONDS. Prints millions of items a second, a line for each repeat. No hugepages and no devices.
 */
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_lcore.h>
#include <rte_malloc.h>
#include <rte_memcpy.h>
#include <rte_pause.h>
#include <rte_ring.h>
#include <rte_ring_elem.h>

#define POOL 64
#define MOST 8192

enum what { ITEMS, ELEM, RECORDS };

struct run {
    enum what what;
    unsigned batch, size, stride;
    struct rte_ring *ring, *back; /* of items or full buffers, of empty buffers */
    uint8_t *sent, *expected;     /* POOL records, one copy for each thread */
    uint64_t count;
    _Atomic int ready, go;
    uint64_t wrong, ended;
};

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, rte_strerror(rte_errno));
    exit(1);
}

/* -- 8-byte items -- */

static inline __attribute__((always_inline)) void put_items(struct run *run, unsigned batch, int elem)
{
    static _Alignas(64) uint64_t items[MOST];
    struct rte_ring *ring = run->ring;

    for (uint64_t number = 0; number < run->count; number += batch) {
        for (unsigned i = 0; i < batch; i++)
            items[i] = number + i;
        if (elem)
            while (rte_ring_sp_enqueue_bulk_elem(ring, items, sizeof *items, batch, NULL) == 0)
                rte_pause();
        else
            while (rte_ring_sp_enqueue_bulk(ring, (void *const *)items, batch, NULL) == 0)
                rte_pause();
    }
}

static inline __attribute__((always_inline)) void take_items(struct run *run, unsigned batch, int elem)
{
    static _Alignas(64) uint64_t items[MOST];
    struct rte_ring *ring = run->ring;
    uint64_t wrong = 0;

    for (uint64_t number = 0; number < run->count; number += batch) {
        if (elem)
            while (rte_ring_sc_dequeue_bulk_elem(ring, items, sizeof *items, batch, NULL) == 0)
                rte_pause();
        else
            while (rte_ring_sc_dequeue_bulk(ring, (void **)items, batch, NULL) == 0)
                rte_pause();
        for (unsigned i = 0; i < batch; i++)
            wrong |= items[i] ^ (number + i);
    }
    run->wrong |= wrong;
}

/* With a batch that the compiler knows, as a program in C has it. */
static void put(struct run *run)
{
    int elem = run->what == ELEM;

    switch (run->batch) {
    case 1: put_items(run, 1, elem); break;
    case 32: put_items(run, 32, elem); break;
    case 256: put_items(run, 256, elem); break;
    default: put_items(run, run->batch, elem);
    }
}

static void take(struct run *run)
{
    int elem = run->what == ELEM;

    switch (run->batch) {
    case 1: take_items(run, 1, elem); break;
    case 32: take_items(run, 32, elem); break;
    case 256: take_items(run, 256, elem); break;
    default: take_items(run, run->batch, elem);
    }
}

/* -- records: a buffer's first 8 bytes are its record's number -- */

static void put_records(struct run *run)
{
    static void *buffers[MOST];
    unsigned batch = run->batch;

    for (uint64_t number = 0; number < run->count; number += batch) {
        while (rte_ring_sc_dequeue_bulk(run->back, buffers, batch, NULL) == 0)
            rte_pause();
        for (unsigned i = 0; i < batch; i++) {
            uint64_t own = number + i;

            memcpy(buffers[i], &own, sizeof own);
            rte_memcpy((uint8_t *)buffers[i] + 8, run->sent + own % POOL * run->stride, run->size);
        }
        while (rte_ring_sp_enqueue_bulk(run->ring, buffers, batch, NULL) == 0)
            rte_pause();
    }
}

static uint64_t differs(const uint8_t *one, const uint8_t *other, unsigned size)
{
    uint64_t wrong, a, b;

    memcpy(&a, one + size - 8, 8);
    memcpy(&b, other + size - 8, 8);
    wrong = a ^ b;
    for (unsigned i = 0; i + 8 <= size; i += 8) {
        memcpy(&a, one + i, 8);
        memcpy(&b, other + i, 8);
        wrong |= a ^ b;
    }
    return wrong;
}

static void take_records(struct run *run)
{
    static void *buffers[MOST];
    unsigned batch = run->batch;
    uint64_t wrong = 0;

    for (uint64_t number = 0; number < run->count; number += batch) {
        while (rte_ring_sc_dequeue_bulk(run->ring, buffers, batch, NULL) == 0)
            rte_pause();
        for (unsigned i = 0; i < batch; i++) {
            uint64_t own;

            memcpy(&own, buffers[i], sizeof own);
            wrong |= own ^ (number + i);
            wrong |= differs((uint8_t *)buffers[i] + 8, run->expected + (number + i) % POOL * run->stride, run->size);
        }
        while (rte_ring_sp_enqueue_bulk(run->back, buffers, batch, NULL) == 0)
            rte_pause();
    }
    run->wrong |= wrong;
}

/* -- rounds -- */

static int consumer(void *argument)
{
    struct run *run = argument;

    atomic_store(&run->ready, 1);
    while (!atomic_load(&run->go))
        rte_pause();
    if (run->what == RECORDS)
        take_records(run);
    else
        take(run);
    run->ended = now();
    return 0;
}

/* Seconds that `count` items take. */
static double once(struct run *run, unsigned lcore, uint64_t count)
{
    uint64_t start;

    run->count = count / run->batch * run->batch;
    atomic_store(&run->ready, 0);
    atomic_store(&run->go, 0);
    if (rte_eal_remote_launch(consumer, run, lcore) != 0)
        fail("rte_eal_remote_launch");
    while (!atomic_load(&run->ready))
        rte_pause();
    atomic_store(&run->go, 1);
    start = now();
    if (run->what == RECORDS)
        put_records(run);
    else
        put(run);
    if (rte_eal_wait_lcore(lcore) != 0 || run->wrong || rte_ring_count(run->ring)) {
        fprintf(stderr, "an item was lost, doubled or torn\n");
        exit(1);
    }
    return (double)(run->ended - start) / 1e9;
}

static void measure(struct run *run, unsigned lcore, unsigned repeats, double seconds)
{
    uint64_t count = 1024 * (uint64_t)run->batch;
    double took;

    while ((took = once(run, lcore, count)) < seconds / 4)
        count *= 2;
    count = (uint64_t)((double)count * seconds / took) / run->batch * run->batch;
    for (unsigned i = 0; i < repeats; i++)
        printf("%.6g\n", (double)count / once(run, lcore, count) / 1e6);
}

/* -- set-up -- */

static struct rte_ring *make_ring(const char *name, unsigned room, unsigned exact)
{
    unsigned flags = RING_F_SP_ENQ | RING_F_SC_DEQ | exact;
    struct rte_ring *ring = rte_ring_create(name, room, SOCKET_ID_ANY, flags);

    if (ring == NULL)
        fail("rte_ring_create");
    return ring;
}

static void *allocate(size_t size)
{
    void *memory = rte_zmalloc(NULL, size, 64);

    if (memory == NULL)
        fail("rte_zmalloc");
    return memory;
}

/* Buffers as many as fill RING_BYTES, and the records that are sent. */
static void make_buffers(struct run *run, size_t ring_bytes)
{
    size_t each = (run->size + 8 + 63) & ~(size_t)63;
    unsigned room = (unsigned)RTE_MAX(ring_bytes / each, 2 * (size_t)run->batch);
    uint8_t *memory = allocate(each * room);

    run->ring = make_ring("full", room, RING_F_EXACT_SZ);
    run->back = make_ring("empty", room, RING_F_EXACT_SZ);
    for (unsigned i = 0; i < room; i++)
        if (rte_ring_sp_enqueue(run->back, memory + i * each) != 0)
            fail("rte_ring_sp_enqueue");
    run->stride = (run->size + 63) & ~63u;
    run->sent = allocate((size_t)POOL * run->stride);
    run->expected = allocate((size_t)POOL * run->stride);
    for (size_t i = 0; i < (size_t)POOL * run->stride; i++)
        run->sent[i] = run->expected[i] = (uint8_t)((i + 1) * 2654435761u >> 13);
}

static void start_eal(const char *program, unsigned long producer, unsigned long consumer)
{
    char cores[64], main_core[32];
    char *arguments[] = {(char *)program, "--no-huge", "--no-pci", "--no-telemetry", "--no-shconf", "-m", "256",
                         "--log-level=4", "-l", cores, "--main-lcore", main_core};

    snprintf(cores, sizeof cores, "%lu,%lu", producer, consumer);
    snprintf(main_core, sizeof main_core, "%lu", producer);
    if (rte_eal_init(RTE_DIM(arguments), arguments) < 0)
        fail("rte_eal_init");
}

int main(int argc, char **argv)
{
    static struct run run;
    unsigned long number[8];

    if (argc != 10) {
        fprintf(stderr, "usage: %s WHAT PRODUCER CONSUMER BATCH SIZE CAPACITY RING_BYTES REPEATS SECONDS\n", argv[0]);
        return 2;
    }
    for (int i = 2; i < 9; i++)
        number[i - 2] = strtoul(argv[i], NULL, 10);
    run.what = strcmp(argv[1], "records") == 0 ? RECORDS : strcmp(argv[1], "elem") == 0 ? ELEM : ITEMS;
    run.batch = (unsigned)number[2];
    run.size = (unsigned)number[3];
    if (run.batch < 1 || run.batch > MOST || run.size < 8) {
        fprintf(stderr, "a batch is of 1 to %d items, a record of 8 bytes or more\n", MOST);
        return 2;
    }
    start_eal(argv[0], number[0], number[1]);
    if (run.what == RECORDS)
        make_buffers(&run, number[5]);
    else /* Not exact, which would take twice the memory: one item less fits. */
        run.ring = make_ring("items", (unsigned)number[4], 0);
    measure(&run, (unsigned)number[1], (unsigned)number[6], strtod(argv[9], NULL));
    return rte_eal_cleanup() == 0 ? 0 : 1;
}
