/* Instructions of a running process: steps PID COUNTER PACKETS
 *
 * Stops it, and lets it go on one instruction at a time until the 64-bit word at address COUNTER in its memory, which
 * counts packets, has grown by PACKETS or a little more; then it runs on. Prints a line for each change of the word:
 * instructions since the one before, and packets. A repeated string instruction stops once for each repetition, and is
 * counted once. Not for measuring time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

static pid_t target;
static void *counter;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static long peek(enum __ptrace_request request, void *at)
{
    errno = 0;
    long word = ptrace(request, target, at, NULL);
    if (errno != 0)
        fail("peek");
    return word;
}

static void await_stop(void)
{
    int status;
    if (waitpid(target, &status, __WALL) < 0 || !WIFSTOPPED(status))
        fail("the process has ended");
}

/* One instruction; 0 if it was a repetition. */
static int step(void)
{
    static long before;
    if (ptrace(PTRACE_SINGLESTEP, target, NULL, NULL))
        fail("step");
    await_stop();
    long at = peek(PTRACE_PEEKUSER, (void *)offsetof(struct user_regs_struct, rip));
    int another = at != before;
    before = at;
    return another;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    target = atoi(argv[1]);
    counter = (void *)strtoull(argv[2], NULL, 0);
    long packets = atol(argv[3]), begun, now;
    /* On the same core: to wake up another one takes ten times as long as a step. */
    cpu_set_t set;
    if (sched_getaffinity(target, sizeof set, &set) || sched_setaffinity(0, sizeof set, &set))
        fail("affinity");
    if (ptrace(PTRACE_ATTACH, target, NULL, NULL))
        fail("attach");
    await_stop();
    for (begun = now = peek(PTRACE_PEEKDATA, counter); now - begun < packets;) {
        long instructions = 0, last = now;
        for (; now == last; now = peek(PTRACE_PEEKDATA, counter))
            instructions += step();
        printf("%ld %ld\n", instructions, now - last);
    }
    ptrace(PTRACE_DETACH, target, NULL, NULL);
    return 0;
}
