/* Round trips between two processes that sleep on POSIX semaphores: semaphores CORE CORE COUNT EVERY_NS
 *
 * The first process posts one semaphore and waits for the other one, the second the reverse. A trip begins EVERY_NS
 * after the last began, at the earliest; in between the first process spins. Writes COUNT durations to standard output,
 * 64-bit numbers of nanoseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct room {
    _Alignas(64) sem_t go;
    _Alignas(64) sem_t back;
};

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

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

static void take(sem_t *semaphore)
{
    while (sem_wait(semaphore))
        if (errno != EINTR)
            fail("sem_wait");
}

static void answer(struct room *room, long count)
{
    for (long i = 0; i < count; i++) {
        take(&room->go);
        sem_post(&room->back);
    }
}

static void ask(struct room *room, long count, int64_t every_ns, int64_t *durations)
{
    for (int64_t i = 0, due = now_ns(); i < count; i++) {
        int64_t now = now_ns();
        while (now < due)
            now = now_ns();
        sem_post(&room->go);
        take(&room->back);
        durations[i] = now_ns() - now;
        due = now + every_ns;
    }
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    long count = atol(argv[3]);
    int64_t *durations = calloc((size_t)count, sizeof *durations);
    struct room *room = mmap(NULL, sizeof *room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (durations == NULL || room == MAP_FAILED || sem_init(&room->go, 1, 0) || sem_init(&room->back, 1, 0))
        fail("memory");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    pin(atoi(argv[child == 0 ? 2 : 1]));
    if (child == 0) {
        answer(room, count);
        return 0;
    }
    ask(room, count, atoll(argv[4]), durations);
    waitpid(child, NULL, 0);
    return fwrite(durations, sizeof *durations, (size_t)count, stdout) == (size_t)count ? 0 : 1;
}
