/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "loan.h"

#include "acl.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>

struct loan {
    struct loan *next;
    dev_t dev;
    ino_t ino;
    int fd; /* O_PATH */
    mode_t mode, lent;
    uint32_t users;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct loan *loans; /* protected by lock; seldom more than one */
/* Odd while anything is lent; else how often something was. */
static _Atomic uint64_t epoch;

static struct loan *find_locked(const struct stat *st)
{
    struct loan *l = loans;

    while (l && (l->dev != st->st_dev || l->ino != st->st_ino))
        l = l->next;
    return l;
}

static errint_t set_mode_of(const struct loan *l, mode_t mode)
{
    char path[PROC_BYTES];

    proc_path(path, l->fd, NULL);
    return chmod(path, mode) < 0 ? errno_or_eio() : 0;
}

static struct loan *loan_new_locked(int fd, const struct stat *st)
{
    struct loan *l = calloc(1, sizeof *l);

    if (l) {
        *l = (struct loan){.next = loans,
                           .dev = st->st_dev,
                           .ino = st->st_ino,
                           .fd = fd,
                           .mode = st->st_mode & 07777};
        if (!loans)
            atomic_fetch_add(&epoch, 1);
        loans = l;
    }
    return l;
}

static void loan_end_locked(struct loan *l)
{
    struct loan **link = &loans;

    while (*link != l)
        link = &(*link)->next;
    *link = l->next;
    if (!loans)
        atomic_fetch_add(&epoch, 1);
    close_keep_errno(l->fd);
    free(l);
}

errint_t loan_take(const char *path, bool nofollow, mode_t bits, struct loan **ret_loan)
{
    struct stat st;
    struct loan *l;
    errint_t err;

    *ret_loan = NULL;
    if (geteuid() == 0)
        return 0;
    cleanup_fd int fd = open(path, O_PATH | O_CLOEXEC | (nofollow ? O_NOFOLLOW : 0));
    if (fd < 0)
        return errno_or_eio();
    pthread_mutex_lock(&lock);
    err = stat_fd(fd, &st);
    l = err < 0 ? NULL : find_locked(&st);
    if (err < 0 || (!S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) || st.st_uid != geteuid() ||
        (!l && (st.st_mode & bits) == bits))
        goto out;
    if (!l) {
        l = loan_new_locked(fd, &st);
        if (!l) {
            err = -ENOMEM;
            goto out;
        }
        (void)steal_fd(&fd);
    }
    if (((l->mode | l->lent) & bits) != bits) {
        err = set_mode_of(l, l->mode | l->lent | bits);
        if (err == 0)
            l->lent |= bits;
    }
    if (err == 0) {
        l->users++;
        *ret_loan = l;
    } else if (l->users == 0) {
        loan_end_locked(l);
    }
out:
    pthread_mutex_unlock(&lock);
    return err;
}

void loan_return(struct loan *l)
{
    if (!l)
        return;
    pthread_mutex_lock(&lock);
    if (--l->users == 0) {
        (void)set_mode_of(l, l->mode);
        loan_end_locked(l);
    }
    pthread_mutex_unlock(&lock);
}

errint_t loan_set_mode(const char *path, mode_t mode)
{
    struct loan *l = NULL;
    struct stat st;
    errint_t err = 0;

    if (geteuid() == 0)
        return chmod(path, mode) < 0 ? errno_or_eio() : 0;
    pthread_mutex_lock(&lock);
    if (loans && stat(path, &st) == 0)
        l = find_locked(&st);
    if (chmod(path, l ? mode | l->lent : mode) < 0)
        err = errno_or_eio();
    else if (l)
        l->mode = mode;
    pthread_mutex_unlock(&lock);
    return err < 0 ? err : acl_follow_mode(path, mode);
}

static errint_t plain_stat(int dirfd, const char *name, int flags, struct stat *ret_st)
{
    return fstatat(dirfd, name, ret_st, flags) < 0 ? errno_or_eio() : 0;
}

errint_t loan_stat(int dirfd, const char *name, int flags, struct stat *ret_st)
{
    uint64_t before = atomic_load(&epoch);
    errint_t err = plain_stat(dirfd, name, flags, ret_st);
    struct loan *l;

    if (err < 0 || (before % 2 == 0 && atomic_load(&epoch) == before))
        return err;
    pthread_mutex_lock(&lock);
    err = plain_stat(dirfd, name, flags, ret_st);
    l = err < 0 ? NULL : find_locked(ret_st);
    if (l)
        ret_st->st_mode = (ret_st->st_mode & ~07777U) | l->mode;
    pthread_mutex_unlock(&lock);
    return err;
}

errint_t as_owner(const char *path, bool nofollow, mode_t bits, errint_t (*fn)(void *arg),
                  void *arg)
{
    errint_t err = fn(arg);
    struct loan *l;

    if (err != -EACCES || loan_take(path, nofollow, bits, &l) < 0 || !l)
        return err;
    err = fn(arg);
    loan_return(l);
    return err;
}
